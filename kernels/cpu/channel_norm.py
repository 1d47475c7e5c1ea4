"""Layer norm and RMS norm through csrc/cpu/kernels/channel_norm.cpp."""

import torch
from torch import Tensor

from .. import native
from ..layout import channels_last, to_order
from ..tiles import make_operand
from .operands import planes, row, row_address


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
    """Serve `cmfast.kernels.channel_norm`. A tensor of another order than NCHW and NHWC is copied first."""
    image = x if x.is_contiguous() else channels_last(x)
    y = torch.empty_like(image)
    if y.numel():
        weight, bias, scale, shift = row(weight), row(bias), row(scale), row(shift)
        launch_channel_norm(y, image, weight, bias, eps, centred, least, scale, shift, silu)
    return to_order(y, x)


def launch_channel_norm(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    least: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> None:
    """Write y. The channels or the positions of both are adjacent, the others evenly spaced; rows are float32."""
    native.run(
        "channel_norm",
        len(x),
        x.shape[2:].numel(),
        native.DTYPES[x.dtype],
        planes(make_operand(x, y)),
        planes(make_operand(y, y)),
        [row_address(t) for t in (weight, bias, scale, shift)],
        eps,
        centred,
        least,
        silu,
    )
