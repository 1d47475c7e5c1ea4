"""Attention through csrc/cpu/kernels/attention.cpp."""

import torch
from torch import Tensor

from .. import native
from ..layout import empty_in_order


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Serve `cmfast.kernels.attention`; arguments and results are those of the reference."""
    out = empty_in_order(q, q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        launch_attention(out, lse, q, k, v, scale)
    return out, lse


def launch_attention(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, products: torch.dtype | None = None
) -> None:
    """Write out and lse [N, H, T]."""
    n, h, t, d = q.shape
    tensors = [(x.data_ptr(), *x.stride()) for x in (q, k, v, out)]
    native.run("attention", (n, h, t, k.shape[2], d), native.DTYPES[q.dtype], *tensors, lse.data_ptr(), scale)
