"""torch.compile: Inductor with frozen weights, whose compiled kernels are kept in a folder."""

import os

import torch
from torch._inductor import config

from cmfast.benchmarking.plain_network import plain_operators

PACKAGES = ("torch",)


def prepare(case, peer, folder):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    torch.set_num_threads(case.threads)
    config.freezing = True  # as an option of torch.compile it comes after the capture, which takes weights for inputs
    unet = case.unet().to(case.torch_dtype())
    inputs = case.torch_inputs()
    compiled = torch.compile(unet, fullgraph=True, dynamic=False)

    def call():
        with torch.inference_mode(), plain_operators():
            return compiled(*inputs).float().numpy()

    return call
