"""Layer norm and RMS norm without torch's dispatcher."""

from torch import Tensor

from .. import backends, remembered
from ..layout import empty_in_order, to_order, with_adjacent_channels
from . import plain


def channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    least: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    backend: str | None = None,
) -> Tensor | None:
    """`cmfast.kernels.channel_norm`. A tensor whose channels are not adjacent in memory is copied first."""
    if not plain.is_plain((x, weight, bias, scale, shift)) or x.ndim < 2 or not x.numel():
        return None
    if activation not in (None, "silu"):
        return None
    backend = backend or backends.override()
    if backend is not None or not x.is_cpu:
        arguments = (x, weight, bias, eps, centred, least, scale, shift, activation is not None)
        return remembered.recall("channel_norm", backend, arguments)
    image = with_adjacent_channels(x)
    y = empty_in_order(image, image.shape)
    numbers = (eps, centred, least)
    if not plain.ran("channel_norm_of", y, image, weight, bias, *numbers, scale, shift, activation is not None):
        return None
    if image is x:
        return y
    return y.contiguous() if x.is_contiguous() else to_order(y, x)
