"""The published reference's outputs, and the networks on formula weights that gave them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from cmfast import UNet, UNetConfig

FIXTURES = Path(__file__).parent / "fixtures"
NETWORKS = {
    "unet_classcond_film_resblockupdown": 1,
    "unet_uncond_addemb_resblockupdown": 2,
    "unet_uncond_film_convresample": 3,
}


def tensors(name):
    """The tensors and the metadata of a fixture file."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def formula_weights(unet, seed):
    """Fill a network with the weights of the rule in the fixtures' metadata."""
    random = np.random.RandomState(seed)
    state = unet.state_dict()
    for key in sorted(state):
        value = random.standard_normal(tuple(state[key].shape))
        if value.ndim > 1:
            value = value / np.sqrt(value[0].size)
        elif key.endswith("weight"):
            value = 1 + 0.2 * value
        else:
            value = 0.1 * value
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    unet.load_state_dict(state)
    return unet.eval()


def network(name):
    """(UNet on formula weights, tensors) of a fixture."""
    data, metadata = tensors(name)
    return formula_weights(UNet(UNetConfig(**json.loads(metadata["config"]))), NETWORKS[name]), data


def tiny_config(**changes):
    """A class-conditional network of a few thousand parameters."""
    sizes = {
        "image_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "num_head_channels": 32,
        "num_classes": 10,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }
    return UNetConfig(**(sizes | changes))


def tiny_unet(seed=0, **changes):
    return formula_weights(UNet(tiny_config(**changes)), seed)
