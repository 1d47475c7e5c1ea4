"""PyTorch as it is, in its default and in its channels-last memory format."""

import torch

from cmfast.benchmarking.plain_network import plain_operators

PACKAGES = ("torch",)


def prepare(case, peer, folder):
    torch.set_num_threads(case.threads)
    layout = torch.channels_last if peer == "torch-channels-last" else torch.contiguous_format
    unet = case.unet().to(case.torch_dtype(), memory_format=layout)
    x, *conditions = case.torch_inputs()
    x = x.to(memory_format=layout)

    def call():
        with torch.inference_mode(), plain_operators():
            return unet(x, *conditions).float().numpy()

    return call
