"""The definition of `cmfast.kernels.channel_norm`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import accumulation_dtype, empty_in_order


def channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    least: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """Return y in the dtype and memory format of x; all before it is float32, or float64 for such an x."""
    wide = accumulation_dtype(x.dtype)

    def row(t: Tensor) -> Tensor:
        return t.to(wide).reshape(*t.shape, *(1,) * (x.ndim - 2))

    u = x.to(wide)
    if centred:
        u = u - u.mean(1, keepdim=True)
    square = u.square().mean(1, keepdim=True).clamp_min(least)
    y = u / torch.sqrt(square + eps)
    if weight is not None:
        y = y * row(weight)
    if bias is not None:
        y = y + row(bias)
    if scale is not None:
        y = y * (1 + row(scale))
    if shift is not None:
        y = y + row(shift)
    if silu:
        y = F.silu(y)
    return empty_in_order(x, x.shape).copy_(y)
