"""Convolution with prepared weights without torch's dispatcher."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, remembered
from ..conv_arguments import GATES, RESAMPLES, ConvArguments, output_shape
from ..layout import empty_channels_last, with_adjacent_channels
from ..relaunch import NOTHING
from . import plain


def conv2d(a: ConvArguments, backend: str | None = None) -> tuple[Tensor, Tensor] | None:
    """`cmfast.kernels.conv2d` of rows of float32 or bfloat16.

    Images whose channels are not adjacent in memory are copied first.
    """
    h, skip, weight, bias, packed, tile, transformed, stride, padding, dtype = a[:10]
    resample, gain, offset, silu, gate, residual, residual_resample, relu, moments = a[10:]
    if packed is None or not plain.is_plain((h, skip, weight, bias, packed, gain, offset, residual)):
        return None
    backend = backend or backends.override()
    if backend is not None or not h.is_cpu:
        return remembered.recall("conv2d", backend, a)
    if resample not in RESAMPLES or residual_resample not in RESAMPLES or gate not in GATES:
        return None
    if h.ndim < 3 or h.ndim != weight.ndim or not h.numel():
        return None
    if (skip is not None and skip.ndim != h.ndim) or (residual is not None and residual.ndim != h.ndim):
        return None
    stride, padding = tuple(stride), tuple(padding)
    layout = _layout(h.shape, weight.shape, stride, padding, resample)
    if layout is None:
        return None
    image = with_adjacent_channels(h)
    skip = skip if skip is None else with_adjacent_channels(skip)
    residual = residual if residual is None else with_adjacent_channels(residual)
    shape, strides = layout
    out = torch.empty_strided(shape, strides, dtype=h.dtype)
    sums = torch.empty((shape[0], 2, shape[1]), dtype=torch.float32) if moments else None
    codes = (RESAMPLES.index(resample), GATES.index(gate), RESAMPLES.index(residual_resample))
    prepared = (weight, bias, packed, tile, transformed, stride, padding, dtype == torch.bfloat16)
    if not plain.ran("conv2d_of", out, sums, image, skip, residual, gain, offset, silu, relu, *codes, *prepared):
        return None
    return out if image is h else out.contiguous(), NOTHING if sums is None else sums


@functools.lru_cache(maxsize=256)
def _layout(
    h: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    resample: str | None,
) -> tuple[Sequence[int], Sequence[int]] | None:
    """Shape and strides of the output for images of these shapes; None where the kernel does not fit in."""
    shape = output_shape(h, weight, stride, padding, resample)
    if min(shape[2:]) < 1:
        return None
    out = empty_channels_last(torch.empty(0, device="meta"), shape)
    return out.shape, out.stride()
