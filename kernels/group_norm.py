"""Group normalisation with everything that surrounds it in a diffusion U-Net, as one operator.

    u = x + add                                    add [N, C], the timestep embedding of non-FiLM blocks
    y = (u - mean) / sqrt(var + eps)               over each of num_groups groups of C / num_groups channels
    y = y * weight + bias                          weight, bias [C]
    y = y * (1 + scale) + shift                    FiLM: scale, shift [N, C]
    y = y * sigmoid(y)                             activation "silu"

x is [N, C, *spatial], or a pair (h, skip) that stands for their concatenation along C.
Wu and He 2018, "Group Normalization", equations 1 to 7; Perez et al. 2018, "FiLM", equation 2.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import direct, reference, remembered
from .backends import require, resolve
from .layout import accumulation_dtype, concatenated_shape, describe, empty_in_order
from .transforms import (
    apply,
    apply_folded,
    differentiates_backward,
    forward_mode,
    needs_definition,
    pullback,
    transformed,
)


def group_norm(
    x: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group norm with an optional addition before it, and affine map, FiLM and SiLU after it.

    Args:
        x: [N, C, *spatial] of any floating dtype and memory format, or a pair `(h, skip)` of tensors
            [N, C1, *spatial] and [N, C2, *spatial] read as their concatenation along the channels.
        num_groups: number of groups; divides C.
        weight: [C], multiplies the normalised value (1 without it).
        bias: [C], added to it (0 without it).
        eps: added to the variance.
        add: [N, C], added to x before the normalisation.
        scale: [N, C], the result is multiplied by 1 + scale.
        shift: [N, C], and shift is added.
        activation: None or "silu".
        backend: name of the backend that must serve the call; None chooses (see `cmfast.kernels.backends`).

    Returns:
        [N, C, *spatial] in the dtype and memory format of x (of h, for a pair). Statistics are computed in float32
        (float64 for float64 inputs).

    Derivatives:
        A kernel computes the gradient of each tensor, under torch.func.grad too, and one launch serves torch.func.vmap
        where weight and bias are not mapped. What no kernel computes is the plain-PyTorch definition's, whatever
        backend is asked for: the derivative of the gradient, value and tangent in forward mode (torch.func.jvp), and
        vmap over weight or bias. See `cmfast.kernels.transforms`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown activation.
        BackendError: the backend asked for cannot serve the call; under a transformation of torch.func too.
    """
    h, skip = x if isinstance(x, tuple | list) else (x, None)
    y = direct.group_norm(h, skip, num_groups, weight, bias, eps, add, scale, shift, activation, backend)
    if y is not None:
        return y
    _check(h, skip, num_groups, weight, bias, add, scale, shift, activation)
    args = (h, skip, num_groups, weight, bias, float(eps), add, scale, shift, activation == "silu", backend)
    if needs_definition():
        require("group_norm", _present(h, skip, weight, bias, add, scale, shift), backend)
        return reference.group_norm(*args[:-1])[0]
    if transformed() or (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (h, skip, weight, bias, add, scale, shift))
    ):
        return apply(_GroupNorm, *args)[0]
    return torch.ops.cmfast.group_norm(*args)[0]


def _check(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> None:
    if h.ndim < 2 or not h.is_floating_point():
        raise ValueError(f"group_norm: x must be a floating-point tensor [N, C, *spatial], got {describe(h)}")
    if skip is not None and (
        skip.ndim != h.ndim or skip.shape[0] != h.shape[0] or skip.shape[2:] != h.shape[2:] or skip.dtype != h.dtype
    ):
        raise ValueError(
            "group_norm: a pair (h, skip) must agree in everything but the number of channels, "
            f"got {describe(h)} and {describe(skip)}"
        )
    n, c = h.shape[0], h.shape[1] + (skip.shape[1] if skip is not None else 0)
    if num_groups < 1 or c % num_groups:
        raise ValueError(
            f"group_norm: num_groups must divide the number of channels, got {num_groups} for {c} channels"
        )
    for name, tensor, shape in (
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("add", add, (n, c)),
        ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    ):
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise ValueError(
                f"group_norm: {name} must be a floating-point tensor {list(shape)}, got {describe(tensor)}"
            )
    if activation not in (None, "silu"):
        raise ValueError(f'group_norm: activation must be None or "silu", got {activation!r}')


torch.library.define(
    "cmfast::group_norm",
    "(Tensor h, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu, str? backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "cmfast::group_norm_backward",
    "(Tensor grad, Tensor h, Tensor? skip, int num_groups, Tensor? weight, Tensor? bias, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu, Tensor mean, Tensor rstd, str? backend) -> (Tensor dx, Tensor dz_sum, Tensor dzu_sum)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::group_norm", "default")
def _group_norm(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu, backend):
    serve = resolve("group_norm", _present(h, skip, weight, bias, add, scale, shift), backend)
    arguments = (h, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    return remembered.serve("group_norm", backend, arguments, serve, *arguments)


@torch.library.impl("cmfast::group_norm_backward", "default")
def _group_norm_backward(grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd, backend):
    serve = resolve("group_norm_backward", _present(grad, h, skip, weight, bias, add, scale, shift), backend)
    return serve(grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd)


@torch.library.register_fake("cmfast::group_norm")
def _group_norm_fake(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu, backend):
    statistics = h.new_empty((h.shape[0], num_groups), dtype=accumulation_dtype(h.dtype))
    return empty_in_order(h, concatenated_shape(h, skip)), statistics, statistics.new_empty(statistics.shape)


@torch.library.register_fake("cmfast::group_norm_backward")
def _group_norm_backward_fake(grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd, backend):
    shape = concatenated_shape(h, skip)
    sums = h.new_empty(shape[:2], dtype=accumulation_dtype(h.dtype))
    return empty_in_order(h, shape), sums, sums.new_empty(sums.shape)


def _present(*tensors: Tensor | None) -> Sequence[Tensor]:
    return [t for t in tensors if t is not None]


class _GroupNorm(torch.autograd.Function):
    """Gradients from two sums a channel: dz_sum = Σ dz and dzu_sum = Σ dz·û, where û is the normalised input.

    z is the value before the activation. Everything but dx follows from these sums and the parameters.
    """

    @staticmethod
    def forward(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu, backend):
        return torch.ops.cmfast.group_norm(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, skip, ctx.num_groups, weight, bias, ctx.eps, add, scale, shift, ctx.silu, ctx.backend = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, skip, weight, bias, add, scale, shift, mean, rstd)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 11
        h, skip, weight, bias, add, scale, shift, mean, rstd = ctx.saved_tensors
        tensors = (grad, h, skip, weight, bias, add, scale, shift)
        if forward_mode():
            sums = _definition_backward(*tensors, ctx.num_groups, ctx.eps, ctx.silu)
        elif differentiates_backward():
            sums = _GroupNormBackward.apply(*tensors, mean, rstd, ctx.num_groups, ctx.eps, ctx.silu, ctx.backend)
        else:
            sums = _fused_backward(*tensors, mean, rstd, ctx.num_groups, ctx.silu, ctx.backend)
        dx, dz_sum, dzu_sum = sums
        need = dict(
            zip(
                ("h", "skip", "num_groups", "weight", "bias", "eps", "add", "scale", "shift"),
                ctx.needs_input_grad,
                strict=False,
            )
        )
        dscale = dweight = dbias = dshift = dadd = None
        if need["shift"]:
            dshift = dz_sum.to(shift.dtype)
        if need["scale"]:
            affine = dzu_sum if weight is None else dzu_sum * weight
            dscale = (affine if bias is None else torch.addcmul(affine, dz_sum, bias.to(affine.dtype))).to(scale.dtype)
        if need["weight"]:
            dweight = _with_film(dzu_sum, scale).sum(0).to(weight.dtype)
        if need["bias"]:
            dbias = _with_film(dz_sum, scale).sum(0).to(bias.dtype)
        if need["add"]:
            positions = tuple(range(2, dx.ndim))
            dadd = (dx.sum(positions, dtype=dz_sum.dtype) if positions else dx).to(add.dtype)
        c = h.shape[1]
        dh = dx if skip is None else dx[:, :c]
        dskip = None if skip is None else dx[:, c:]
        return dh, dskip, None, dweight, dbias, None, dadd, dscale, dshift, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        if in_dims[3] is None and in_dims[4] is None:
            return apply_folded(_GroupNorm, info.batch_size, in_dims, arguments, shared=(3, 4))
        # A launch has one weight and one bias for all samples.
        *operands, backend = arguments
        require("group_norm", [t for t in operands if isinstance(t, Tensor)], backend)
        return torch.vmap(reference.group_norm, in_dims[:-1])(*operands), (0, 0, 0)


class _GroupNormBackward(torch.autograd.Function):
    """The kernel of the backward where it is differentiated in turn: by the definition."""

    @staticmethod
    def forward(grad, h, skip, weight, bias, add, scale, shift, mean, rstd, num_groups, eps, silu, backend):
        return _fused_backward(grad, h, skip, weight, bias, add, scale, shift, mean, rstd, num_groups, silu, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, ctx.num_groups, ctx.eps, ctx.silu, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        # mean and rstd are functions of the input here, so that all of the derivative is its.
        constants = (ctx.num_groups, ctx.eps, ctx.silu)
        found = pullback(_definition_backward, ctx.saved_tensors, grads, ctx.needs_input_grad[:8], *constants)
        return *found, *((None,) * 6)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        if in_dims[3] is None and in_dims[4] is None:
            return apply_folded(_GroupNormBackward, info.batch_size, in_dims, arguments, shared=(3, 4))
        *tensors, _, _, num_groups, eps, silu, _ = arguments
        definition = functools.partial(_definition_backward, num_groups=num_groups, eps=eps, silu=silu)
        return torch.vmap(definition, in_dims[:8])(*tensors), (0, 0, 0)


def _with_film(sums: Tensor, scale: Tensor | None) -> Tensor:
    """Sums [N, C] times 1 + scale."""
    return sums if scale is None else torch.addcmul(sums, sums, scale.to(sums.dtype))


def _fused_backward(grad, h, skip, weight, bias, add, scale, shift, mean, rstd, num_groups, silu, backend):
    return torch.ops.cmfast.group_norm_backward(
        grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd, backend
    )


def _definition_backward(grad, h, skip, weight, bias, add, scale, shift, num_groups, eps, silu):
    """The outputs of the backward as functions of these arguments alone, in operators that torch differentiates."""
    with torch.enable_grad():
        _, *statistics = reference.group_norm(h, skip, num_groups, None, None, eps, add, None, None, False)
        return reference.group_norm_backward(
            grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, *statistics
        )
