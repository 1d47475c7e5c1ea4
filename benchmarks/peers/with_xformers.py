"""PyTorch with the attention of xFormers."""

import torch

from cmfast.benchmarking.plain_network import plain_operators

from .case import UnavailableError, evaluated
from .others import OTHERS

PACKAGES = ("xformers",)
DEVICES = ("cuda",)


def prepare(case, folder):
    from xformers.ops import memory_efficient_attention

    def attend(q, k, v):
        return memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    unet = case.unet().to(case.device, case.torch_dtype(), memory_format=torch.channels_last)
    if case.network in OTHERS:
        if not hasattr(unet.network, "enable_xformers_memory_efficient_attention"):
            raise UnavailableError("diffusers has no attention of xFormers for this network")
        unet.network.enable_xformers_memory_efficient_attention()
    x, *conditions = case.torch_inputs()
    x = x.to(memory_format=torch.channels_last)
    return evaluated(unet, x, *conditions, within=lambda: plain_operators(attend))
