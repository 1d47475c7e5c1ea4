"""Layer norm and RMS norm without torch's dispatcher."""

from torch import Tensor

from .. import backends, remembered
from ..layout import empty_in_order
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
    """`cmfast.kernels.channel_norm` of images in the order of NCHW or of NHWC."""
    if not plain.is_plain((x, weight, bias, scale, shift)) or x.ndim < 2 or not x.numel():
        return None
    if activation not in (None, "silu"):
        return None
    backend = backend or backends.override()
    if backend is not None or not x.is_cpu:
        arguments = (x, weight, bias, eps, centred, least, scale, shift, activation is not None)
        return remembered.recall("channel_norm", backend, arguments)
    y = empty_in_order(x, x.shape)
    numbers = (eps, centred, least)
    ran = plain.ran("channel_norm_of", y, x, weight, bias, *numbers, scale, shift, activation is not None)
    return y if ran else None
