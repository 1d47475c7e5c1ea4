"""How many threads a batch may be evaluated with, where its last bits depend on that.

Sums that threads divide among themselves are rounded in another way. Of a `UNet` that the engine runs on a processor,
none is divided as long as there is a sample for each thread. What torch computes with more than one thread may depend
on their number. On a GPU nothing does.
"""

import contextlib
from collections.abc import Iterator

import torch

from ..engine.accelerator import accelerator_of
from ..model import ConsistencyModel
from ..unet import UNet


def most_threads(model: ConsistencyModel, batch_size: int) -> int | None:
    """The most threads whose number leaves no trace in the samples; None where that is any number."""
    if model.device.type != "cpu":
        return None
    return batch_size if isinstance(model.unet, UNet) and accelerator_of(model.unet) is not None else 1


@contextlib.contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Within the block, torch and the kernels compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
