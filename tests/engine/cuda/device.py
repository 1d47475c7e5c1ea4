"""Where the target for GPUs is tested: on a GPU, or on CPU tensors by Triton's interpreter."""

import torch

from .. import networks

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


#: Smaller than elsewhere: Triton's interpreter takes a millisecond for a program of a launch.
SIZES = {"audio": 8, "video": (1, 4, 4)}


def network(kind, batch=2, **changes):
    """(network, its inputs), on the device."""
    changes = {"image_size": SIZES.get(kind, 4), "attention_resolutions": (2,)} | changes
    unet, inputs = networks.network(kind, batch, **changes)
    return unet.to(DEVICE), [x.to(DEVICE) for x in inputs]
