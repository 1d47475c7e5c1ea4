"""The definitions of `cmfast.kernels.channel_moments`, `fold_group_norm` and `apply_group_norm`."""

import math

import torch
from torch import Tensor

from ..layout import accumulation_dtype, empty_image
from .conv import resampled


def channel_moments(x: Tensor) -> Tensor:
    """Return the means and sums of squared deviations [N, 2, C] of the channels of x."""
    values = x.to(accumulation_dtype(x.dtype)).reshape(*x.shape[:2], math.prod(x.shape[2:]))
    mean = values.mean(2, keepdim=True)
    return torch.stack((mean[..., 0], (values - mean).square().sum(2)), dim=1).to(torch.float32)


def fold_group_norm(
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return gain and offset [N, C]; all before them is float64."""
    gain, offset = _fold(first, second, size, num_groups, weight, bias, eps, add, scale, shift)
    return gain.float(), offset.float()


def apply_group_norm(
    h: Tensor,
    skip: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    resample: str | None,
) -> Tensor:
    """Return y [N, C, *spatial], normalised by the statistics that the moments give."""
    x = h if skip is None else torch.cat((h, skip), dim=1)
    x = x.to(accumulation_dtype(h.dtype))
    size = math.prod(h.shape[2:])
    folded = _fold(first, second, size, num_groups, weight, bias, eps, add, scale, shift)
    gain, offset = (row.to(x.dtype).reshape(*row.shape, *(1,) * (x.ndim - 2)) for row in folded)
    y = torch.addcmul(offset, x, gain)
    y = resampled(torch.nn.functional.silu(y) if silu else y, resample)
    return empty_image(h, y.shape).copy_(y)


def _fold(
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gain and offset [N, C] in float64."""
    moments = (first if second is None else torch.cat((first, second), dim=2)).double()
    n, _, c = moments.shape
    mean, deviation = moments.unbind(1)
    moved = mean if add is None else mean + add.double()
    grouped = moved.reshape(n, num_groups, c // num_groups)
    middle = grouped.mean(2, keepdim=True)
    variance = deviation.reshape(grouped.shape) / size + (grouped - middle).square()
    rstd = (variance.mean(2, keepdim=True) + eps).rsqrt().expand_as(grouped).reshape(n, c)
    centre = middle.expand_as(grouped).reshape(n, c)
    film = 1.0 if scale is None else 1 + scale.double()
    gain = weight.double() * rstd * film
    offset = bias.double() * film - (centre if add is None else centre - add.double()) * gain
    if shift is not None:
        offset = offset + shift.double()
    return gain, offset
