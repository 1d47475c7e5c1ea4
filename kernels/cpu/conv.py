"""Convolution with prepared weights through csrc/cpu/kernels/conv.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..conv_arguments import GATES, RESAMPLES, ConvArguments, in_three
from ..layout import channels_adjoin, empty_channels_last, with_adjacent_channels
from . import memory

#: Counts the changes of what `pack` writes: weights that were packed by another number are not read.
PACKING = 2

_Sizes = tuple[int, int, int]
_Shape = tuple[int, int, _Sizes, int, bool, bool]


def packing() -> str:
    """The name of what `pack` writes: its number, and the layout of the instruction set in use."""
    return f"{PACKING}, {native.cpu().build_info()['layout']}"


def pack(weight: Tensor, tile: int, transformed: bool, dtype: torch.dtype) -> Tensor:
    """The weights [Cout, Cin, *kernel] as the kernels read them, transformed in float64 and rounded once to `dtype`."""
    shape = _shape(weight.shape, tile, transformed, dtype)
    words = native.cpu().packed_words(shape)
    packed = memory.empty(4 * words).view(dtype)
    weight = weight.float().contiguous()
    native.run("pack", shape, weight.data_ptr(), packed.data_ptr())
    return packed


def conv2d(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """Serve `cmfast.kernels.conv2d`; arguments and results are those of the reference.

    Tensors whose channels are not adjacent in memory are copied first, and such an output afterwards.
    """
    shape, ordered = a.output_shape(), channels_adjoin(a.h)
    n, channels = shape[:2]
    out = empty_channels_last(a.h, shape)
    sums = torch.empty((n, 2, channels) if a.moments else 0, dtype=torch.float32, device="cpu")
    if n:
        skip, residual = (t if t is None else with_adjacent_channels(t) for t in (a.skip, a.residual))
        a = a._replace(h=with_adjacent_channels(a.h), skip=skip, residual=residual)
        a = a._replace(gain=_float32(a.gain), offset=_float32(a.offset), bias=_float32(a.bias))
        launch_conv2d(out, sums if a.moments else None, a)
    return out if ordered else out.contiguous(), sums


def launch_conv2d(out: Tensor, moments: Tensor | None, a: ConvArguments) -> None:
    """Write out, and the moments where they are given. Images have their channels adjacent, rows are float32."""
    assert a.packed is not None
    # The rows of a one-dimensional image are all the same one, so that it is resampled as others are.
    height = (2,) if a.h.ndim == 3 and a.resample == "average" else ()
    native.run(
        "conv2d",
        _shape(a.weight.shape, a.tile, a.transformed, a.dtype),
        a.h.shape[0],
        in_three((*height, *a.h.shape[2:])),
        in_three(out.shape[2:]),
        in_three(a.stride),
        in_three(a.padding[::2], 0),
        RESAMPLES.index(a.resample),
        native.DTYPES[a.h.dtype],
        _image(a.h),
        _image(a.skip),
        _image(a.residual),
        RESAMPLES.index(a.residual_resample),
        _image(out),
        native.address(a.gain),
        native.address(a.offset),
        a.silu,
        GATES.index(a.gate),
        a.relu,
        a.packed.data_ptr(),
        native.address(a.bias),
        native.address(moments),
    )


def _shape(weight: Sequence[int], tile: int, transformed: bool, dtype: torch.dtype) -> _Shape:
    return weight[1], weight[0], in_three(weight[2:]), tile, transformed, dtype == torch.bfloat16


def _float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _image(t: Tensor | None) -> tuple[int, int, int, int, int, int] | None:
    return None if t is None else (t.data_ptr(), t.shape[1], t.stride(0), *in_three(t.stride()[2:], 0))
