"""The definition of every operator in plain PyTorch: any device, any dtype, float64 for exact answers."""

from collections.abc import Sequence

from torch import Tensor

from .attention import attention, attention_backward
from .channel_norm import channel_norm
from .consistency import consistency_step, consistency_step_backward
from .conv import conv2d
from .group_norm import group_norm, group_norm_backward
from .moments import apply_group_norm, channel_moments, fold_group_norm
from .timestep_embedding import timestep_embedding

__all__ = [
    "apply_group_norm",
    "attention",
    "attention_backward",
    "available",
    "channel_moments",
    "channel_norm",
    "consistency_step",
    "consistency_step_backward",
    "conv2d",
    "fold_group_norm",
    "group_norm",
    "group_norm_backward",
    "timestep_embedding",
]


def available(op: str, tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """The definition serves every call."""
    return True, ""
