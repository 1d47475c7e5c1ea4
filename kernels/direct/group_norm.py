"""Group norm without torch's dispatcher."""

import torch
from torch import Tensor

from . import plain


def group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """`cmfast.kernels.group_norm` of contiguous or channels-last images and rows of float32 or bfloat16."""
    if not plain.is_plain((h, skip, weight, bias, add, scale, shift)) or not h.is_cpu:
        return None
    if activation not in (None, "silu") or (skip is not None and skip.ndim != h.ndim):
        return None
    if h.is_contiguous():
        layout = torch.contiguous_format
    elif h.ndim == 4 and h.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    else:
        return None
    y = torch.empty_like(h, memory_format=layout) if skip is None else _concatenated(h, skip, layout)
    rows = (weight, bias, add, scale, shift)
    return y if plain.ran("group_norm_of", y, h, skip, num_groups, *rows, eps, activation is not None) else None


def _concatenated(h: Tensor, skip: Tensor, layout: torch.memory_format) -> Tensor:
    """An uninitialised tensor for the pair's concatenation along the channels."""
    shape = (h.shape[0], h.shape[1] + skip.shape[1], *h.shape[2:])
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=layout)
