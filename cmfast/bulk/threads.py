"""How many threads a batch may be evaluated with, where its last bits depend on that.

Sums that threads divide among themselves are rounded in another way. The operators divide none in a way that depends on
the number of threads, but torch does: so of a `UNet` that the engine runs the bits are the same, of others they may not
be. On a GPU nothing depends on it.
"""

import contextlib
from collections.abc import Iterator

import torch

from ..engine.accelerator import accelerator_of
from ..model import ConsistencyModel
from ..unet import UNet


def most_threads(model: ConsistencyModel) -> int | None:
    """The most threads whose number leaves no trace in the samples; None where that is any number."""
    accelerated = isinstance(model.unet, UNet) and accelerator_of(model.unet) is not None
    return None if accelerated or model.device.type != "cpu" else 1


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Within the block, torch and the kernels compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
