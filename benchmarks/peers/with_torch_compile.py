"""torch.compile: Inductor with frozen weights, max-autotune on a GPU; its compiled kernels are kept in a folder."""

import os

import torch

from cmfast.benchmarking.plain_network import plain_operators

from .case import evaluated

PACKAGES = ("torch",)
DEVICES = ("cpu", "cuda")


def prepare(case, folder):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    from torch._inductor import config

    config.freezing = True  # as an option of torch.compile it comes after the capture, which takes weights for inputs
    gpu = case.device == "cuda"
    unet = case.unet().to(case.device, case.torch_dtype())
    x, *conditions = case.torch_inputs()
    if gpu:  # as its documentation recommends for convolutions; on the CPU it chooses the layout itself
        unet, x = unet.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    compiled = torch.compile(unet, fullgraph=True, dynamic=False, mode="max-autotune" if gpu else None)
    return evaluated(compiled, x, *conditions, within=plain_operators)
