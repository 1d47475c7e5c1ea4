"""Group norm of values whose moments are known: what is left of it once `conv2d` has returned them.

    mean, var of each group                        folded from the moments of its channels, of x + add
    y = (x + add - mean) / sqrt(var + eps)         add [N, C]
    y = y * weight + bias                          weight, bias [C]
    y = y * (1 + scale) + shift                    FiLM: scale, shift [N, C]
    y = y * sigmoid(y)                             activation "silu"
    y = average pooling by 2                       resample "average"

x is [N, C, *spatial], or a pair (h, skip) that stands for their concatenation along C; its moments are those of
`conv2d` and `channel_moments`, and nothing is summed over positions here: x is read once.
"""

import torch
from torch import Tensor

from . import direct, remembered
from .backends import resolve
from .conv_arguments import resampled_sizes
from .layout import concatenated_shape, describe, empty_image
from .transforms import refuse_gradients


def apply_group_norm(
    x: Tensor | tuple[Tensor, Tensor],
    moments: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    resample: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group norm by given moments, with an addition before it, and FiLM, SiLU and average pooling after it.

    For inference: there are no gradients.

    Args:
        x: [N, C, *spatial] of any floating dtype, fastest in channels_last, or a pair `(h, skip)` of tensors
            [N, C1, *spatial] and [N, C2, *spatial] read as their concatenation along the channels.
        moments: [N, 2, C], float32, the means and sums of squared deviations of each channel of x, as `conv2d` and
            `channel_moments` return them; for a pair a pair of them.
        num_groups: number of groups; divides C.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        add: [N, C], added to x before the normalisation; the moments are those of x without it.
        scale: [N, C], FiLM's.
        shift: [N, C], FiLM's.
        activation: None or "silu".
        resample: None, or "average" for the average pooling by 2 of the activated values: of height and width, or of
            audio's one dimension, but not of a video's depth. Of an odd size the last is left out.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        [N, C, *spatial] in the dtype of x: channels last where x (h, for a pair) is, else contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown activation or resample.
        RuntimeError: an input requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    h, skip = x if isinstance(x, tuple | list) else (x, None)
    first, second = moments if isinstance(moments, tuple | list) else (moments, None)
    rest = (num_groups, weight, bias, eps, add, scale, shift, activation, resample, backend)
    if (y := direct.apply_group_norm(h, skip, first, second, *rest)) is not None:
        return y
    _check_input(h, skip, activation, resample)
    _check_moments(h, skip, first, second)
    _check_rows(h, skip, num_groups, weight, bias, add, scale, shift)
    tensors = (h, skip, first, second, weight, bias, add, scale, shift)
    refuse_gradients("apply_group_norm", "it serves inference", *tensors)
    return torch.ops.cmfast.apply_group_norm(
        *(h, skip, first, second, num_groups, weight, bias, float(eps), add, scale, shift),
        *(activation == "silu", resample, backend),
    )


def _check_input(h: Tensor, skip: Tensor | None, activation: str | None, resample: str | None) -> None:
    if h.ndim < 2 or not h.is_floating_point() or 0 in h.shape[1:]:
        raise ValueError(f"apply_group_norm: x must be a floating-point tensor [N, C, *spatial], got {describe(h)}")
    if skip is not None and (
        skip.ndim != h.ndim or [skip.shape[0], *skip.shape[2:]] != [len(h), *h.shape[2:]] or skip.dtype != h.dtype
    ):
        raise ValueError(
            "apply_group_norm: a pair (h, skip) must agree in everything but the number of channels, "
            f"got {describe(h)} and {describe(skip)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f'apply_group_norm: activation must be None or "silu", got {activation!r}')
    if resample not in (None, "average"):
        raise ValueError(f'apply_group_norm: resample must be None or "average", got {resample!r}')
    if resample is not None and (h.ndim not in (3, 4, 5) or min(resampled_sizes(h.shape[2:], resample)) < 1):
        raise ValueError(
            "apply_group_norm: average pooling by 2 takes one to three spatial dimensions, those that it halves of "
            f"at least 2, got {describe(h)}"
        )


def _check_moments(h: Tensor, skip: Tensor | None, first: Tensor, second: Tensor | None) -> None:
    if (skip is None) != (second is None):
        given = ("one tensor" if t is None else "a pair" for t in (skip, second))
        raise ValueError(
            "apply_group_norm: x and moments must be both one tensor or both a pair, got {} and {}".format(*given)
        )
    for x, moments in ((h, first), (skip, second)):
        if x is None or moments is None:
            continue
        shape = (len(x), 2, x.shape[1])
        if moments.shape != shape or moments.dtype != torch.float32:
            raise ValueError(f"apply_group_norm: moments must be float32 {list(shape)}, got {describe(moments)}")


def _check_rows(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    n, c = concatenated_shape(h, skip)[:2]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"apply_group_norm: num_groups must divide the number of channels, got {num_groups} for {c}")
    rows = (("weight", weight, (c,)), ("bias", bias, (c,)))
    films = (("add", add, (n, c)), ("scale", scale, (n, c)), ("shift", shift, (n, c)))
    for name, t, shape in (*rows, *(film for film in films if film[1] is not None)):
        if t is None or t.shape != shape or not t.is_floating_point():
            raise ValueError(f"apply_group_norm: {name} must be floating point {list(shape)}, got {describe(t)}")


torch.library.define(
    "cmfast::apply_group_norm",
    "(Tensor h, Tensor? skip, Tensor first, Tensor? second, int num_groups, Tensor weight, Tensor bias, float eps, "
    "Tensor? add, Tensor? scale, Tensor? shift, bool silu, str? resample, str? backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::apply_group_norm", "default")
def _apply_group_norm(*arguments):
    *others, backend = arguments
    tensors = [t for t in others if isinstance(t, Tensor)]
    serve = resolve("apply_group_norm", tensors, backend)
    return remembered.serve("apply_group_norm", backend, others, serve, *others)


@torch.library.register_fake("cmfast::apply_group_norm")
def _apply_group_norm_fake(h, skip, *rest):
    *_, resample, _ = rest
    return empty_image(h, output_shape(h, skip, resample))


def output_shape(h: Tensor, skip: Tensor | None, resample: str | None) -> list[int]:
    """[N, C1 + C2, *spatial], once the spatial dimensions are resampled."""
    n, c, *spatial = concatenated_shape(h, skip)
    return [n, c, *resampled_sizes(spatial, resample)]
