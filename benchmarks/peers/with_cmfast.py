"""cmfast: the accelerated network, and the network as it is, with its fused operators alone."""

import torch

import cmfast

from .case import UnavailableError
from .others import OTHERS

PACKAGES = ("cmfast",)


def prepare(case, peer, folder):
    torch.set_num_threads(case.threads)
    if peer == "cmfast":
        unet = cmfast.accelerate(case.unet(), dtype=case.torch_dtype(), cache=folder, keep_weights=False)
    elif case.network in OTHERS:
        raise UnavailableError("the fused operators alone are those of cmfast's own network")
    else:
        unet = case.unet().to(case.torch_dtype(), memory_format=torch.channels_last)
    x, *conditions = case.torch_inputs()

    def call():
        with torch.inference_mode():
            return unet(x, *conditions).float().numpy()

    return call
