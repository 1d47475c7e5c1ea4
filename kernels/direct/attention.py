"""Attention without torch's dispatcher."""

import math

from torch import Tensor

from .. import backends, remembered
from ..layout import empty_in_order
from . import plain


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None = None) -> Tensor | None:
    """`cmfast.kernels.attention` of tensors of any strides."""
    if not plain.is_plain((q, k, v)) or q.ndim != 4 or not q.numel():
        return None
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    backend = backend or backends.override()
    if backend is not None or not q.is_cpu:
        found = remembered.recall("attention", backend, (q, k, v, scale))
        return None if found is None else found[0]
    out = empty_in_order(q, q.shape)
    return out if plain.ran("attention_of", out, q, k, v, scale) else None
