"""Moments of channels, and a group norm folded from them to one multiply-add a channel.

    moments[n, 0, c] = mean of x[n, c]
    moments[n, 1, c] = Σ (x[n, c] − mean)²
    gain · x + offset = group_norm(x + add) · (1 + scale) + shift

`conv2d` returns the moments of its output, `channel_moments` those of any tensor; `conv2d` applies gain and offset to
its input, `apply_group_norm` folds and applies them in one launch. Chan, Golub and LeVeque 1983, "Algorithms for
Computing the Sample Variance", equation 2.1.
"""

import torch
from torch import Tensor

from . import direct, remembered
from .backends import resolve
from .layout import describe
from .transforms import refuse_gradients


def channel_moments(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The mean and the sum of squared deviations from it of each channel. For inference: there are no gradients.

    Args:
        x: [N, C, *spatial] of any floating dtype, fastest in channels_last; not empty but for N.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        [N, 2, C], float32.

    Raises:
        ValueError: x is not such a tensor.
        RuntimeError: x requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    if (found := direct.channel_moments(x, backend)) is not None:
        return found
    if x.ndim < 2 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(f"channel_moments: x must be a floating-point tensor [N, C, *spatial], got {describe(x)}")
    refuse_gradients("channel_moments", "it serves inference", x)
    return torch.ops.cmfast.channel_moments(x, backend)


def fold_group_norm(
    moments: Tensor | tuple[Tensor, Tensor],
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Fold a group norm, and FiLM after it, to the gain and offset [N, C] that `conv2d` applies to its input.

    For inference: there are no gradients.

    Args:
        moments: [N, 2, C], float32, the means and sums of squared deviations of each channel, as `conv2d` and
            `channel_moments` return them, or a pair of them of two tensors that are read as their concatenation.
        size: number of positions of a channel, H · W.
        num_groups: number of groups; divides C.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        add: [N, C], added to the input before the normalisation; gain and offset apply to the input without it.
        scale: [N, C], FiLM's.
        shift: [N, C], FiLM's.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        gain and offset [N, C], float32; all before them is float64, on a GPU float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: an input requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    first, second = moments if isinstance(moments, tuple | list) else (moments, None)
    found = direct.fold_group_norm(first, second, size, num_groups, weight, bias, eps, add, scale, shift, backend)
    if found is not None:
        return found
    _check(first, second, size, num_groups, weight, bias, add, scale, shift)
    refuse_gradients("fold_group_norm", "it serves inference", first, second, weight, bias, add, scale, shift)
    return torch.ops.cmfast.fold_group_norm(
        first, second, size, num_groups, weight, bias, float(eps), add, scale, shift, backend
    )


def _check(
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    for moments in (first, second):
        if moments is not None and (moments.ndim != 3 or moments.shape[1] != 2 or moments.dtype != torch.float32):
            raise ValueError(f"fold_group_norm: moments must be float32 [N, 2, C], got {describe(moments)}")
    if second is not None and second.shape[0] != first.shape[0]:
        raise ValueError(
            f"fold_group_norm: a pair must agree in N, got moments {describe(first)} and {describe(second)}"
        )
    n, c = len(first), first.shape[2] + (0 if second is None else second.shape[2])
    if size < 1:
        raise ValueError(f"fold_group_norm: size must be positive, got {size}")
    if num_groups < 1 or c % num_groups or not c:
        raise ValueError(f"fold_group_norm: num_groups must divide the number of channels, got {num_groups} for {c}")
    rows = (("weight", weight, (c,)), ("bias", bias, (c,)))
    films = (("add", add, (n, c)), ("scale", scale, (n, c)), ("shift", shift, (n, c)))
    for name, t, shape in (*rows, *(film for film in films if film[1] is not None)):
        if t is None or t.shape != shape or not t.is_floating_point():
            raise ValueError(f"fold_group_norm: {name} must be floating point {list(shape)}, got {describe(t)}")


torch.library.define("cmfast::channel_moments", "(Tensor x, str? backend) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "cmfast::fold_group_norm",
    "(Tensor first, Tensor? second, int size, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? add, "
    "Tensor? scale, Tensor? shift, str? backend) -> (Tensor gain, Tensor offset)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::channel_moments", "default")
def _channel_moments(x, backend):
    return remembered.serve("channel_moments", backend, (x,), resolve("channel_moments", [x], backend), x)


@torch.library.impl("cmfast::fold_group_norm", "default")
def _fold_group_norm(*arguments):
    *others, backend = arguments
    tensors = [t for t in others if isinstance(t, Tensor)]
    serve = resolve("fold_group_norm", tensors, backend)
    return remembered.serve("fold_group_norm", backend, others, serve, *others)


@torch.library.register_fake("cmfast::channel_moments")
def _channel_moments_fake(x, backend):
    return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)


@torch.library.register_fake("cmfast::fold_group_norm")
def _fold_group_norm_fake(first, second, *rest):
    gain = first.new_empty((len(first), first.shape[2] + (0 if second is None else second.shape[2])))
    return gain, gain.new_empty(gain.shape)
