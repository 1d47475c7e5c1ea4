"""Attention and its derivative through csrc/cuda/attention_*.cu: one launch forward, two backward."""

import torch
from torch import Tensor

from .. import native
from ..layout import empty_in_order


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Serve `cmfast.kernels.attention`; arguments and results are those of the reference."""
    out = empty_in_order(q, q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch_attention(out, lse, q, k, v, scale)
    return out, lse


def launch_attention(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Write out and lse [N, H, T]."""
    native.launch(
        "attention", q, _sizes(q, k), scale, _tensor(q), _tensor(k), _tensor(v), _tensor(out), native.address(lse)
    )


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Serve the gradients of attention; arguments and results are those of the reference."""
    dq, dk, dv = (empty_in_order(x, x.shape) for x in (q, k, v))
    if not q.shape[2]:
        return dq, dk.zero_(), dv.zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    native.launch(
        "attention_backward",
        q,
        _sizes(q, k),
        scale,
        *(_tensor(x) for x in (grad, q, k, v, out)),
        native.address(lse),
        native.address(delta),
        *(_tensor(x) for x in (dq, dk, dv)),
    )
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    n, heads, queries, head_dim = q.shape
    return native.DTYPES[q.dtype], n, heads, queries, k.shape[2], head_dim


def _tensor(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return native.address(x), x.stride()
