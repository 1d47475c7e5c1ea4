"""The definition of `cmfast.kernels.conv2d`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import accumulation_dtype, image_format


def conv2d(
    h: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    packed: Tensor | None,
    tile: int,
    transformed: bool,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    resample: str | None,
    gain: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    residual: Tensor | None,
    residual_resample: str | None,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output [N, Cout, H, W], and the means and sums of squared deviations of its channels [N, 2, Cout].

    float64 inputs are multiplied in float64, whatever the weights were prepared for.
    """
    wide = accumulation_dtype(h.dtype)
    u = (h if skip is None else torch.cat((h, skip), dim=1)).to(wide)
    if gain is not None and offset is not None:
        u = torch.addcmul(offset.to(wide)[:, :, None, None], u, gain.to(wide)[:, :, None, None])
    if silu:
        u = F.silu(u)
    u = _resampled(u, resample)
    products = wide if wide == torch.float64 else dtype
    y = F.conv2d(u.to(products), weight.to(products), None, stride, padding).to(wide)
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    if residual is not None:
        y = y + _resampled(residual.to(wide), residual_resample)
    sums = y.new_empty(0, dtype=torch.float32)
    if moments:
        mean = y.mean((2, 3), keepdim=True)
        sums = torch.stack((mean[:, :, 0, 0], (y - mean).square().sum((2, 3))), dim=1).to(torch.float32)
    return y.to(h.dtype).contiguous(memory_format=image_format(h)), sums


def _resampled(u: Tensor, resample: str | None) -> Tensor:
    if resample == "nearest":
        return F.interpolate(u, scale_factor=2, mode="nearest")
    return F.avg_pool2d(u, 2) if resample == "average" else u
