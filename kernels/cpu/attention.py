"""Attention through csrc/cpu/kernels/attention.cpp, and its gradient through attention_backward.cpp."""

import torch
from torch import Tensor

from .. import native
from ..layout import empty_in_order


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, products: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Serve `cmfast.kernels.attention`; arguments and results are those of the reference.

    `products` is bfloat16 to round the operands of both products to it; sums and softmax stay float32.
    """
    if products not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"attention: products must be None, float32 or bfloat16, got {products}")
    out = empty_in_order(q, q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        launch_attention(out, lse, q, k, v, scale, products)
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Serve `cmfast.kernels.attention_backward`; arguments and results are those of the reference.

    Products are of float32, whatever the dtype.
    """
    dq, dk, dv = (empty_in_order(x, x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    n, h, t, d = q.shape
    grad, out, lse = grad.to(q.dtype), out.to(q.dtype), lse.contiguous()
    tensors = [(x.data_ptr(), *x.stride()) for x in (grad, q, k, v, out, dq, dk, dv)]
    sizes = (n, h, t, k.shape[2], d)
    native.run("attention_backward", sizes, native.DTYPES[q.dtype], *tensors, lse.data_ptr(), scale)
    return dq, dk, dv


def launch_attention(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, products: torch.dtype | None = None
) -> None:
    """Write out and lse [N, H, T]."""
    n, h, t, d = q.shape
    tensors = [(x.data_ptr(), *x.stride()) for x in (q, k, v, out)]
    sizes, pairs = (n, h, t, k.shape[2], d), products == torch.bfloat16
    native.run("attention", sizes, native.DTYPES[q.dtype], pairs, *tensors, lse.data_ptr(), scale)
