"""The definition of `cmfast.kernels.conv2d`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..conv_arguments import ConvArguments, resample_factors
from ..layout import accumulation_dtype, empty_image

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the number of dimensions
_GATES = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
_POOLINGS = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def conv2d(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """Return the output [N, Cout, *spatial], and the means and sums of squared deviations of its channels [N, 2, Cout].

    float64 inputs are multiplied in float64, whatever the weights were prepared for.
    """
    h = a.h
    wide = accumulation_dtype(h.dtype)

    def spread(rows: Tensor) -> Tensor:
        return rows.to(wide).reshape(*rows.shape, *(1,) * (h.ndim - 2))

    if a.gate is not None and a.skip is not None:
        u = h.to(wide) * _GATES[a.gate](a.skip.to(wide))
    else:
        u = (h if a.skip is None else torch.cat((h, a.skip), dim=1)).to(wide)
    if a.gain is not None and a.offset is not None:
        u = torch.addcmul(spread(a.offset), u, spread(a.gain))
    if a.silu:
        u = F.silu(u)
    u = resampled(u, a.resample)
    products = wide if wide == torch.float64 else a.dtype
    u = _padded(u.to(products), a)
    if u.ndim == 5 and u.shape[1] == 1:  # of some of its strides torch 2.13 reads what is not there
        u = u.clone(memory_format=torch.contiguous_format)
    y = _CONVOLUTIONS[h.ndim](u, a.weight.to(products), None, list(a.stride)).to(wide)
    if a.bias is not None:
        y = y + spread(a.bias)
    if a.residual is not None:
        y = y + resampled(a.residual.to(wide), a.residual_resample)
    if a.relu:
        y = F.relu(y)
    sums = y.new_empty(0, dtype=torch.float32)
    if a.moments:
        values = y.flatten(2)
        mean = values.mean(2, keepdim=True)
        sums = torch.stack((mean[:, :, 0], (values - mean).square().sum(2)), dim=1).to(torch.float32)
    return empty_image(h, y.shape).copy_(y), sums


def _padded(u: Tensor, a: ConvArguments) -> Tensor:
    """The input with its zeros; torch counts the dimensions from the last."""
    pairs = zip(a.padding[::2], a.padding[1::2], strict=True)
    sides = [side for pair in reversed([*pairs]) for side in pair]
    return F.pad(u, sides) if any(sides) else u


def resampled(u: Tensor, resample: str | None) -> Tensor:
    """The tensor [N, C, *spatial] after nearest upsampling by 2 ("nearest") or average pooling by 2 ("average")."""
    factors = resample_factors(u.ndim - 2)
    if resample == "nearest":
        return F.interpolate(u, scale_factor=tuple(map(float, factors)), mode="nearest")
    return _POOLINGS[u.ndim](u, factors) if resample == "average" else u
