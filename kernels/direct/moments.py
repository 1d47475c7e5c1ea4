"""Moments of channels, and group norm folded from them, without torch's dispatcher."""

import torch
from torch import Tensor

from .. import backends, remembered
from ..layout import with_adjacent_channels
from . import plain


def channel_moments(x: Tensor, backend: str | None = None) -> Tensor | None:
    """`cmfast.kernels.channel_moments`. A tensor whose channels are not adjacent in memory is copied first."""
    if not plain.is_plain((x,)) or x.ndim < 2 or not x.numel():
        return None
    backend = backend or backends.override()
    if backend is not None or not x.is_cpu:
        return remembered.recall("channel_moments", backend, (x,))
    moments = torch.empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32, device="cpu")
    return moments if plain.ran("moments_of", moments, with_adjacent_channels(x)) else None


def fold_group_norm(
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`cmfast.kernels.fold_group_norm` of contiguous moments and rows of float32 or bfloat16."""
    if not plain.is_plain((first, second, weight, bias, add, scale, shift)) or first.ndim != 3:
        return None
    backend = backend or backends.override()
    if backend is not None or not first.is_cpu:
        arguments = (first, second, size, num_groups, weight, bias, eps, add, scale, shift)
        return remembered.recall("fold_group_norm", backend, arguments)
    if second is not None and second.ndim != 3:
        return None
    channels = first.shape[2] + (0 if second is None else second.shape[2])
    gain = torch.empty((first.shape[0], channels), dtype=torch.float32, device="cpu")
    offset = torch.empty_like(gain)
    rows = (weight, bias, add, scale, shift)
    done = plain.ran("fold_group_norm_of", gain, offset, first, second, size, num_groups, *rows, eps)
    return (gain, offset) if done else None
