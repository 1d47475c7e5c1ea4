"""PyTorch as it is, in its default memory format."""

import torch

from cmfast.benchmarking.plain_network import plain_operators

from .case import evaluated

PACKAGES = ("torch",)
DEVICES = ("cpu", "cuda")


def prepare(case, folder, layout=torch.contiguous_format):
    unet = case.unet().to(case.device, case.torch_dtype(), memory_format=layout)
    x, *conditions = case.torch_inputs()
    return evaluated(unet, x.to(memory_format=layout), *conditions, within=plain_operators)
