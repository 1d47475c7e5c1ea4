"""Group norm without torch's dispatcher."""

import torch
from torch import Tensor

from .. import backends, remembered
from ..layout import concatenated_shape
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
    backend: str | None = None,
) -> Tensor | None:
    """`cmfast.kernels.group_norm` of contiguous or channels-last images and rows of float32 or bfloat16."""
    if not plain.is_plain((h, skip, weight, bias, add, scale, shift)) or activation not in (None, "silu"):
        return None
    backend = backend or backends.override()
    if backend is not None or not h.is_cpu:
        arguments = (h, skip, num_groups, weight, bias, eps, add, scale, shift, activation is not None)
        found = remembered.recall("group_norm", backend, arguments)
        return None if found is None else found[0]
    if skip is not None and skip.ndim != h.ndim:
        return None
    if h.is_contiguous():
        layout = torch.contiguous_format
    elif h.ndim == 4 and h.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    else:
        return None
    if skip is None:
        y = torch.empty_like(h, memory_format=layout)
    else:
        y = torch.empty(concatenated_shape(h, skip), dtype=h.dtype, device="cpu", memory_format=layout)
    rows = (weight, bias, add, scale, shift)
    return y if plain.ran("group_norm_of", y, h, skip, num_groups, *rows, eps, activation is not None) else None
