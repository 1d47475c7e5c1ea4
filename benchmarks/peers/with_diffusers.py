"""diffusers: the network as its own UNet2DModel, with the weights under its names."""

import torch

from .case import UnavailableError, evaluated
from .others import OTHERS, import_diffusers

PACKAGES = ("diffusers",)
DEVICES = ("cpu", "cuda")


def network(case):
    """The UNet2DModel in the precision and on the device of the case; called with (x, timesteps, class_labels)."""
    from cmfast.checkpoints.diffusers_config import unet2d_config
    from cmfast.checkpoints.diffusers_names import to_diffusers

    if case.network in OTHERS:
        raise UnavailableError("the network is diffusers' own already: torch evaluates it")
    unet = case.unet()
    try:
        settings = unet2d_config(unet.config)
    except ValueError as error:
        raise UnavailableError(str(error)) from error
    with torch.device("meta"):
        made = import_diffusers().UNet2DModel(**settings)
    made.load_state_dict(to_diffusers(unet.config, unet.state_dict()), assign=True)
    layout = torch.channels_last  # as its documentation recommends
    return made.eval().requires_grad_(False).to(case.device, case.torch_dtype()).to(memory_format=layout)


def prepare(case, folder):
    unet = network(case)
    x, *conditions = case.torch_inputs()
    x = x.to(memory_format=torch.channels_last)
    return evaluated(lambda *inputs: unet(*inputs, return_dict=False)[0], x, *conditions)
