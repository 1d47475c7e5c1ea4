"""Convolution with prepared weights through csrc/cpu/kernels/conv.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..layout import image_format
from . import memory

#: Counts the changes of what `pack` writes: weights that were packed by another number are not read.
PACKING = 1

_RESAMPLE = {None: 0, "nearest": 1, "average": 2}
_Shape = tuple[int, int, int, int, bool, bool]


def pack(weight: Tensor, tile: int, transformed: bool, dtype: torch.dtype) -> Tensor:
    """The weights [Cout, Cin, k, k] as the kernels read them, transformed in float64 and rounded once to `dtype`."""
    shape = _shape(weight.shape, tile, transformed, dtype)
    words = native.cpu().packed_words(shape)
    packed = memory.empty(4 * words).view(dtype)
    weight = weight.float().contiguous()
    native.run("pack", shape, weight.data_ptr(), packed.data_ptr())
    return packed


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
    """Serve `cmfast.kernels.conv2d`; arguments and results are those of the reference.

    Tensors whose channels are not adjacent in memory are copied first, and such an output afterwards.
    """
    assert packed is not None  # kernels/conv.py
    n, _, height, width = h.shape
    kernel, scale = weight.shape[2], {None: (1, 1), "nearest": (2, 1), "average": (1, 2)}[resample]
    sizes = [(s * scale[0] // scale[1] + 2 * padding - kernel) // stride + 1 for s in (height, width)]
    out = torch.empty((n, weight.shape[0], *sizes), dtype=h.dtype, memory_format=torch.channels_last)
    sums = torch.empty((n, 2, weight.shape[0]) if moments else 0, dtype=torch.float32)
    if n:
        first, second, added = _channels_last(h), _channels_last(skip), _channels_last(residual)
        assert first is not None
        gain, offset, bias = (None if t is None else t.float().contiguous() for t in (gain, offset, bias))
        launch_conv2d(
            out,
            sums if moments else None,
            first,
            second,
            weight.shape,
            bias,
            packed,
            tile,
            transformed,
            stride,
            padding,
            dtype,
            resample,
            gain,
            offset,
            silu,
            added,
            residual_resample,
        )
    return out.contiguous(memory_format=image_format(h)), sums


def launch_conv2d(
    out: Tensor,
    moments: Tensor | None,
    h: Tensor,
    skip: Tensor | None,
    weight_shape: Sequence[int],
    bias: Tensor | None,
    packed: Tensor,
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
) -> None:
    """Write out, and the moments where they are given. Images have their channels adjacent, rows are float32."""
    native.run(
        "conv2d",
        _shape(weight_shape, tile, transformed, dtype),
        (h.shape[0], *h.shape[2:]),
        tuple(out.shape[2:]),
        stride,
        padding,
        _RESAMPLE[resample],
        native.DTYPES[h.dtype],
        _image(h),
        _image(skip),
        _image(residual),
        _RESAMPLE[residual_resample],
        _image(out),
        native.address(gain),
        native.address(offset),
        silu,
        packed.data_ptr(),
        native.address(bias),
        native.address(moments),
    )


def _shape(weight: Sequence[int], tile: int, transformed: bool, dtype: torch.dtype) -> _Shape:
    return weight[1], weight[0], weight[2], tile, transformed, dtype == torch.bfloat16


def _channels_last(t: Tensor | None) -> Tensor | None:
    if t is None or t.shape[1] == 1 or t.stride(1) == 1:
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _image(t: Tensor | None) -> tuple[int, int, int, int, int] | None:
    return None if t is None else (t.data_ptr(), t.shape[1], t.stride(0), t.stride(2), t.stride(3))
