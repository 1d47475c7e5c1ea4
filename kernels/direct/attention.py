"""Attention without torch's dispatcher."""

import math

from torch import Tensor

from ..layout import empty_in_order
from . import plain


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
    """`cmfast.kernels.attention` of tensors of any strides."""
    if not plain.is_plain((q, k, v)) or not q.is_cpu or q.ndim != 4 or not q.numel():
        return None
    out = empty_in_order(q, q.shape)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    return out if plain.ran("attention_of", out, q, k, v, scale) else None
