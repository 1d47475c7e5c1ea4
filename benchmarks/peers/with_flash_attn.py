"""PyTorch with the attention of flash-attn."""

import torch

from cmfast.benchmarking.plain_network import plain_operators

from .case import UnavailableError, evaluated
from .others import OTHERS

PACKAGES = ("flash-attn",)
DEVICES = ("cuda",)
REFUSED = {"fp32": "it has no float32"}


def prepare(case, folder):
    from flash_attn import flash_attn_func

    if case.network in OTHERS:
        raise UnavailableError("the UNets of diffusers cannot be told to call it: torch's attention is the same kernel")

    def attend(q, k, v):
        return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    unet = case.unet().to(case.device, case.torch_dtype(), memory_format=torch.channels_last)
    x, *conditions = case.torch_inputs()
    x = x.to(memory_format=torch.channels_last)
    return evaluated(unet, x, *conditions, within=lambda: plain_operators(attend))
