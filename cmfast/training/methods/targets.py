"""The other evaluation of a pair: that of a target network, which has no gradient."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def same_dropout(images: Tensor) -> Iterator[None]:
    """Without gradients, and with the dropout masks of the evaluation that follows the block.

    Both evaluations of a pair must drop the same: Song and Dhariwal 2023, "Improved Techniques for Training Consistency
    Models", section 3.1. torch's random state is put back at the end, on the device of `images` too. What autocast has
    cast in the block is forgotten: in torch 2.9 the evaluation that follows took weights of it, without gradients.
    """
    device = images.device
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
        yield
    torch.clear_autocast_cache()
