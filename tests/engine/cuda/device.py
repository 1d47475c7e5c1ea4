"""Where the target for GPUs is tested: on a GPU, or on CPU tensors by Triton's interpreter."""

import torch

from .. import networks

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


def network(kind, *arguments, **changes):
    """(network, its inputs), on the device."""
    unet, inputs = networks.network(kind, *arguments, **changes)
    return unet.to(DEVICE), [x.to(DEVICE) for x in inputs]
