"""Samples that are numbers: before they are written or measured."""

import torch
from torch import Tensor


def check_finite(samples: Tensor) -> None:
    """Raise FloatingPointError where samples [N, ...] are not all finite numbers."""
    wrong = len(samples) - int(torch.isfinite(samples[:, None]).flatten(1).all(1).sum())
    if wrong:
        raise FloatingPointError(
            f"{wrong} of {len(samples)} samples are not finite (NaN or infinity): weights that are damaged, or a dtype "
            "in which the network overflows"
        )
