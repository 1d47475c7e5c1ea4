"""Softmax attention over heads, read in place from packed projections.

    attention(q, k, v) = softmax(scale · q kᵀ) v       q [N, H, T, D], k and v [N, H, S, D], scale 1/√D

Vaswani et al. 2017, "Attention Is All You Need", equation 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import direct, reference, remembered
from .backends import require, resolve
from .layout import accumulation_dtype, empty_in_order
from .transforms import (
    apply,
    apply_folded,
    differentiates_backward,
    forward_mode,
    needs_definition,
    pullback,
    transformed,
)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Scaled dot-product attention without a mask, softmax in float32 (float64 for float64 inputs).

    Args:
        q: [N, H, T, D], any strides.
        k: [N, H, S, D], any strides, dtype of q.
        v: [N, H, S, D], any strides, dtype of q.
        scale: factor of the scores; None means 1/√D.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        [N, H, T, D] in the dtype of q, dense, its dimensions in memory in the order of those of q: for views made by
        `split_qkv` the heads fold back into the packed layout without a copy.

    Derivatives:
        A kernel computes the gradients of q, k and v, under torch.func.grad too, and one launch serves torch.func.vmap.
        What no kernel computes is the plain-PyTorch definition's, whatever backend is asked for, with its [T, S] matrix
        of scores: the derivative of the gradients, and value and tangent in forward mode (torch.func.jvp). See
        `cmfast.kernels.transforms`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot serve the call; under a transformation of torch.func too.
    """
    if (out := direct.attention(q, k, v, scale, backend)) is not None:
        return out
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attention: expected q [N, H, T, D] and k, v [N, H, S, D], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention: q, k and v must share a floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[2] == 0 or k.shape[3] == 0:
        raise ValueError(f"attention: k and v must have at least one position and channel, got {list(k.shape)}")
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if needs_definition():
        require("attention", (q, k, v), backend)
        return reference.attention(q, k, v, scale)[0]
    if transformed() or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return apply(_Attention, q, k, v, scale, backend)[0]
    return torch.ops.cmfast.attention(q, k, v, scale, backend)[0]


def split_qkv(
    qkv: Tensor, num_heads: int, layout: str = "3hd", channels_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """View a packed projection as q, k and v [N, H, T, D], without a copy.

    Args:
        qkv: [N, 3·H·D, T], or [N, T, 3·H·D], any strides.
        num_heads: H.
        layout: order of the packed channels: "3hd" (consistency_models, diffusers) or "h3d" (guided-diffusion's
            legacy order).
        channels_dim: 1 or 2, where the channels are. None takes the one dimension that 3·H divides, and 1 where it
            divides both: pass it where T may be a multiple of 3·H.

    Raises:
        ValueError: a size that 3·H does not divide, or an unknown layout.
    """
    if layout not in ("3hd", "h3d"):
        raise ValueError(f'split_qkv: layout must be "3hd" or "h3d", got {layout!r}')
    if qkv.ndim != 3 or num_heads < 1 or channels_dim not in (None, 1, 2):
        raise ValueError(
            "split_qkv: expected qkv [N, 3·H·D, T] or [N, T, 3·H·D], at least one head and channels_dim 1 or 2, "
            f"got {list(qkv.shape)}, {num_heads} heads and channels_dim {channels_dim}"
        )
    if channels_dim is None:
        channels_dim = 2 if qkv.shape[1] % (3 * num_heads) else 1
    channels = qkv.shape[channels_dim]
    if channels % (3 * num_heads) or not channels:
        raise ValueError(
            f"split_qkv: 3 x {num_heads} heads must divide the channels, got {channels} channels in {list(qkv.shape)}"
        )
    packed = qkv if channels_dim == 2 else qkv.transpose(1, 2)
    head_dim = channels // (3 * num_heads)
    if layout == "3hd":
        q, k, v = packed.unflatten(2, (3, num_heads, head_dim)).unbind(2)
    else:
        q, k, v = packed.unflatten(2, (num_heads, 3, head_dim)).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


torch.library.define(
    "cmfast::attention",
    "(Tensor q, Tensor k, Tensor v, float scale, str? backend) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "cmfast::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, str? backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::attention", "default")
def _attention(q, k, v, scale, backend):
    serve = resolve("attention", (q, k, v), backend)
    return remembered.serve("attention", backend, (q, k, v, scale), serve, q, k, v, scale)


@torch.library.impl("cmfast::attention_backward", "default")
def _attention_backward(grad, q, k, v, out, lse, scale, backend):
    return resolve("attention_backward", (grad, q, k, v), backend)(grad, q, k, v, out, lse, scale)


@torch.library.register_fake("cmfast::attention")
def _attention_fake(q, k, v, scale, backend):
    return empty_in_order(q, q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("cmfast::attention_backward")
def _attention_backward_fake(grad, q, k, v, out, lse, scale, backend):
    return empty_in_order(q, q.shape), empty_in_order(k, k.shape), empty_in_order(v, v.shape)


class _Attention(torch.autograd.Function):
    """Backward from the saved log-sum-exp of the scores, without the attention matrix (Dao et al. 2022, B.2)."""

    @staticmethod
    def forward(q, k, v, scale, backend):
        return torch.ops.cmfast.attention(q, k, v, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, ctx.scale, ctx.backend = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        q, k, v, out, lse = ctx.saved_tensors
        if forward_mode():
            return *_definition_backward(grad, q, k, v, ctx.scale), None, None
        serve = _AttentionBackward.apply if differentiates_backward() else torch.ops.cmfast.attention_backward
        return *serve(grad, q, k, v, out, lse, ctx.scale, ctx.backend), None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return apply_folded(_Attention, info.batch_size, in_dims, arguments)


class _AttentionBackward(torch.autograd.Function):
    """The kernel of the backward where it is differentiated in turn: by the definition."""

    @staticmethod
    def forward(grad, q, k, v, out, lse, scale, backend):
        return torch.ops.cmfast.attention_backward(grad, q, k, v, out, lse, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, q, k, v, _, _, ctx.scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, q, k, v)

    @staticmethod
    def backward(ctx, *grads):
        # out and lse are functions of q, k and v here, so that all of the derivative is theirs.
        found = pullback(_definition_backward, ctx.saved_tensors, grads, ctx.needs_input_grad[:4], ctx.scale)
        return *found, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return apply_folded(_AttentionBackward, info.batch_size, in_dims, arguments)


def _definition_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Sequence[Tensor]:
    """The gradients of q, k and v as functions of these arguments alone, in operators that torch differentiates."""
    return reference.attention_backward(grad, q, k, v, *reference.attention(q, k, v, scale), scale)
