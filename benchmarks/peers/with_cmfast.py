"""cmfast: the accelerated network, and the network as it is, with its fused operators alone."""

import torch

import cmfast

PACKAGES = ("cmfast",)


def prepare(case, peer, folder):
    torch.set_num_threads(case.threads)
    if peer == "cmfast":
        unet = cmfast.accelerate(case.unet(), dtype=case.torch_dtype(), cache=folder, keep_weights=False)
    else:
        unet = case.unet().to(case.torch_dtype(), memory_format=torch.channels_last)
    x, *conditions = case.torch_inputs()

    def call():
        with torch.inference_mode():
            return unet(x, *conditions).float().numpy()

    return call
