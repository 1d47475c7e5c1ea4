"""cmfast's network as it is loaded, with its fused operators alone, in channels-last."""

import torch

from .case import UnavailableError, evaluated
from .others import OTHERS

PACKAGES = ("cmfast",)
DEVICES = ("cpu", "cuda")


def prepare(case, folder):
    if case.network in OTHERS:
        raise UnavailableError("the fused operators alone are those of cmfast's own network")
    unet = case.unet().to(case.device, case.torch_dtype(), memory_format=torch.channels_last)
    return evaluated(unet, *case.torch_inputs())
