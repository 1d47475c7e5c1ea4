"""Convolutions of 3 x 3 elements through csrc/cuda/conv.cu; the formula is in kernels/conv.py.

One launch is the product, with all that is done to its input and added to its output; two, where the sum is taken in
segments or the moments of the output are asked for: the second adds up the segments, or merges the tiles' moments, in
their order.

Images lie with their channels innermost, in 16-byte vectors; others are copied first.
"""

import math

import torch
from torch import Tensor

from .. import native
from ..conv_arguments import RESAMPLES, ConvArguments
from ..conv_weights import pack
from ..layout import channels_adjoin, empty_channels_last, reach
from . import conv_plan


def serves(a: ConvArguments) -> tuple[bool, str]:
    """Whether the kernel serves a convolution, and why not."""
    reason = _refusal(a)
    return not reason, reason


def conv2d(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """Serve `cmfast.kernels.conv2d`; arguments and results are those of the reference.

    Weights that were packed for another backend are packed here at every call.
    """
    shape = a.output_shape()
    out = empty_channels_last(a.h, shape)
    moments = a.h.new_empty((shape[0], 2, shape[1]) if a.moments else 0, dtype=torch.float32)
    if out.numel():
        launch_conv2d(out, moments if a.moments else None, a)
    return out if channels_adjoin(a.h) else out.contiguous(), moments


def launch_conv2d(out: Tensor, moments: Tensor | None, a: ConvArguments) -> None:
    """Write out [N, C, H, W], whose channels are innermost, and the moments [N, 2, C] where they are wanted."""
    n, columns, height, width = out.shape
    plan = conv_plan.plan(height, width, columns, _sources(a))
    packed = _rows(a.packed) if a.packed is not None and a.packed.ndim == 2 else pack(a.weight, a.dtype)
    h, skip, residual = (None if t is None else _in_vectors(t) for t in (a.h, a.skip, a.residual))
    bias, gain, offset = (None if t is None else _rows(t.float()) for t in (a.bias, a.gain, a.offset))
    workspace = None
    if plan.segments > 1:
        workspace = out.new_empty((plan.segments, n, height, width, columns), dtype=torch.float32)
    elif a.moments:
        workspace = out.new_empty((n, plan.tiles, 2, columns), dtype=torch.float32)
    native.launch(
        "conv2d",
        a.h,
        [_image(t) for t in (h, skip, residual, out)],
        [(0, 0) if t is None else (native.address(t), t.stride(0)) for t in (gain, offset)],
        native.address(packed),
        native.address(bias),
        native.address(moments),
        native.address(workspace),
        (n, height, width, a.h.shape[1], 0 if skip is None else skip.shape[1], columns),
        (native.DTYPES[out.dtype], a.resample == "nearest", a.silu, a.relu, RESAMPLES.index(a.residual_resample)),
        (plan.tile_width, plan.segment),
    )


def _sources(a: ConvArguments) -> list[int]:
    """The channels of the input, or of each of a pair."""
    return [a.h.shape[1]] if a.skip is None else [a.h.shape[1], a.skip.shape[1]]


def _refusal(a: ConvArguments) -> str:
    """Why the kernel does not serve a convolution, or nothing."""
    kernel, dtype = tuple(a.weight.shape[2:]), a.h.dtype
    if kernel != (3, 3) or tuple(a.stride) != (1, 1) or tuple(a.padding) != (1, 1, 1, 1):
        given = f"{' x '.join(map(str, kernel))} with stride {tuple(a.stride)} and padding {tuple(a.padding)}"
        return f"the CUDA kernel has 3 x 3 elements, stride 1 and padding 1, got {given}"
    if dtype == torch.float32 or a.dtype != dtype:
        given = f"{_name(a.dtype)} products of {_name(dtype)}"
        return f"the CUDA kernel multiplies float16 or bfloat16 tensors in their own dtype, got {given}"
    if a.gate is not None or a.resample == "average":
        given = "a gate" if a.gate is not None else "an average pooling"
        return f"the CUDA kernel has no input with {given}"
    _, columns, height, width = a.output_shape()
    sources = _sources(a)
    if any(c % 8 or not c for c in (*sources, columns)):
        given = f"{' and '.join(map(str, sources))} channels to {columns}"
        return f"the CUDA kernel reads and writes 8 channels at a time, got {given}"
    images = [reach(image) for image in (a.h, a.skip, a.residual) if image is not None]
    if (most := max(*images, columns * height * width)) >= 1 << 31:
        return f"the CUDA kernel serves samples that reach over less than 2^31 elements, got {most}"
    if (programs := conv_plan.plan(height, width, columns, sources).programs) < conv_plan.PROGRAMS:
        shape = f"{height} x {width} positions and {columns} channels"
        return f"{programs} blocks, all that {shape} give, would leave most of a GPU idle"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_vectors(t: Tensor) -> Tensor:
    """The image, its channels innermost and each position's on a boundary of 16 bytes; copied where they are not."""
    strides = [t.stride(d) for d in (0, 2, 3) if t.shape[d] > 1]
    if channels_adjoin(t) and math.gcd(8, *strides) == 8 and t.data_ptr() % 16 == 0:
        return t
    return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _rows(t: Tensor) -> Tensor:
    """The rows [..., C], each on a boundary of 16 bytes; copied where they are not."""
    even = t.ndim == 1 or t.stride(0) * t.element_size() % 16 == 0 or len(t) == 1
    if t.stride(-1) == 1 and even and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _image(t: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if t is None else (native.address(t), t.stride(0), t.stride(2), t.stride(3))
