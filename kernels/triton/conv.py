"""Convolution on the GPU: `cmfast.kernels.conv2d`, whose file states the formula.

One launch is the product, with all that is added to it, and the moments of its output: see conv_product.py. What is
done to the input before would be done again there for every tap of the kernel and every tile of output channels: of a
kernel of one tap gain, offset and SiLU are applied there as it is read; all else is written once, by conv_input.py.

Images lie with their channels innermost; others are copied first. float32 operands are multiplied as three products of
tf32 halves (`input_precision="tf32x3"`) by NVIDIA's matrix instructions, and as such by AMD's.
"""

import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from ..backends import BackendError
from ..conv_arguments import GATES, ConvArguments, in_three, resampled_sizes
from ..conv_weights import pack
from ..layout import channels_adjoin, channels_last, empty_channels_last, reach
from . import conv_config
from .conv_config import Config, configuration
from .conv_input import conv_input_kernel
from .conv_product import AVERAGE, NEAREST, NO_RESIDUAL, PLAIN, conv_product_kernel
from .conv_refusal import MOST, input_shape, makes_input, refusal
from .launch import Launch, architecture, is_amd

_RESIDUALS = {None: PLAIN.value, "nearest": NEAREST.value, "average": AVERAGE.value}


def conv2d(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """Serve `cmfast.kernels.conv2d`; arguments and results are those of the reference.

    Weights that were packed for another backend are packed here at every call.
    """
    ordered = channels_adjoin(a.h)
    if a.packed is None or a.packed.ndim != 2:
        a = a._replace(packed=pack(a.weight, a.dtype))
    launches, (out, moments) = plan_conv2d(a)
    for launch in launches:
        launch.run()
    return out if ordered else out.contiguous(), moments


def plan_conv2d(
    a: ConvArguments, *, arch: str | None = None, choose: Callable[..., Config] = configuration
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches of `conv2d`, and the outputs that they fill: out, channels last, and moments.

    Reads no data, so tensors may be without any; but images whose channels are not adjacent are copied. `arch` is the
    architecture to plan for, "sm_90" or "gfx942" say; None means that of the device of h. `choose` gives the product's
    tiles, from the arguments of `conv_config.configuration`.
    """
    assert a.packed is not None
    shape = a.output_shape()
    out = empty_channels_last(a.h, shape)
    moments = a.h.new_empty((shape[0], 2, shape[1]) if a.moments else 0, dtype=torch.float32)
    if not out.numel():
        return [], (out, moments)
    if refused := refusal(a):
        raise BackendError(f"backend 'triton' cannot serve conv2d: {refused}")
    h = a.h if channels_adjoin(a.h) else channels_last(a.h)
    a = a._replace(h=h, skip=_last(a.skip), residual=_last(a.residual))
    a = a._replace(gain=_row(a.gain), offset=_row(a.offset))
    launches = []
    if makes_input(a):
        launch, u = plan_input(a)
        launches.append(launch)
        resample = None if a.resample == "average" else a.resample
        a = a._replace(h=u, skip=None, gain=None, offset=None, silu=False, gate=None, resample=resample)
    launches.append(_plan_product(a, out, moments, arch or architecture(a.h.device), choose))
    return launches, (out, moments)


def plan_input(a: ConvArguments) -> tuple[Launch, Tensor]:
    """What writes the input of the products, and where: all that is done to it before, but for upsampling."""
    pool = a.resample == "average"
    n, channels, *sizes = input_shape(a)
    u = a.h.new_empty((n, *sizes, channels), dtype=a.dtype).movedim(-1, 1)
    _, height, width = in_three(sizes)
    positions = math.prod(sizes)
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    block_p = min(32, triton.next_power_of_2(positions))
    tiles_p, tiles_c = triton.cdiv(positions, block_p), triton.cdiv(channels, block_c)
    launch = Launch(
        conv_input_kernel,
        (n * tiles_p * tiles_c,),
        (
            *(*_image(a.h), *_image(a.skip), *_rows(a.gain), *_rows(a.offset), u),
            *(a.h.shape[1], channels, height, width, positions, tiles_p, tiles_c),
        ),
        dict(
            GATE=GATES.index(a.gate),
            AFFINE=a.gain is not None,
            SILU=a.silu,
            POOL=pool,
            ROWS=len(sizes) > 1,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            H_UNIT=_unit(a.h),
            SKIP_UNIT=_unit(a.skip),
            UNIT=_unit(u),
        ),
    )
    return launch, u


def _plan_product(a: ConvArguments, out: Tensor, moments: Tensor, arch: str, choose: Callable[..., Config]) -> Launch:
    assert a.packed is not None
    n, columns, *sizes = out.shape
    kernel, taps = a.weight.shape[2:], math.prod(a.weight.shape[2:])
    sources = [a.h.shape[1]] if a.skip is None else [a.h.shape[1], a.skip.shape[1]]
    config = choose(math.prod(sizes), columns, sources, taps, a.packed.element_size(), arch)
    inside = a.resample is None and not any(a.padding)
    h, skip, residual, to = a.h, a.skip, a.residual, out
    if inside and set(a.stride) == {1} and taps == 1 and a.gain is None and not a.moments and not a.residual_resample:
        images = [_flat(t) for t in (h, skip, residual, to)]
        flat = all(found is not None or t is None for found, t in zip(images, (h, skip, residual, to), strict=True))
        if flat and all(image is None or reach(image) <= MOST for image in images):
            h, skip, residual, to = images  # type: ignore[assignment]
            n, sizes = 1, [to.shape[2]]
    positions = math.prod(sizes)
    tiles_m, tiles_n = triton.cdiv(positions, config.block_m), triton.cdiv(columns, config.block_n)
    slots = partials = sum_tickets = moment_tickets = None
    tiles = n * tiles_m * tiles_n
    split = config.segments > 1 and tiles < conv_config.PROGRAMS
    if split:
        partials = out.new_empty((config.segments, tiles, config.block_m, config.block_n), dtype=torch.float32)
        sum_tickets = out.new_zeros(tiles, dtype=torch.int32)
    if a.moments:
        slots = out.new_empty((n, tiles_m, 2, columns), dtype=torch.float32)
        moment_tickets = out.new_zeros(n * tiles_n, dtype=torch.int32)
    depth, height, width = in_three(resampled_sizes(h.shape[2:], a.resample))
    _, out_height, out_width = in_three(sizes)
    return Launch(
        conv_product_kernel,
        (tiles, config.segments if split else 1),
        (
            *(*_image(h), *_image(skip), a.packed, a.bias, *_rows(a.gain), *_rows(a.offset)),
            *(*_image(residual), *_image(to), moments if a.moments else None, slots, partials),
            *(sum_tickets, moment_tickets, sources[0], sum(sources[1:]), columns, depth, height, width),
            *(out_height, out_width, positions, tiles_m, tiles_n),
        ),
        dict(
            KERNEL=in_three(kernel),
            STRIDE=in_three(a.stride),
            PADDING=in_three(a.padding[::2], 0),
            INSIDE=inside,
            UP=_shifts(len(a.h.shape) - 2, a.resample),
            AFFINE=a.gain is not None,
            SILU=a.silu,
            RELU=a.relu,
            RESIDUAL=NO_RESIDUAL.value if residual is None else _RESIDUALS[a.residual_resample],
            ROWS=a.h.ndim > 3,
            VIDEO=len(sizes) > 2,
            SPLIT=split,
            H_UNIT=_unit(h),
            SKIP_UNIT=_unit(skip),
            OUT_UNIT=min(_unit(to), math.gcd(16, columns)),
            RESIDUAL_UNIT=_unit(residual),
            WHOLE=(*_whole(sources, config), columns % config.block_n == 0),
            PRECISION="ieee" if is_amd(arch) else "tf32x3",
            AMD=is_amd(arch),
            **_constants(config),
        ),
        config.num_warps,
        config.num_stages,
    )


def _constants(config: Config) -> dict[str, int]:
    return dict(
        SEGMENT=config.segment,
        SEGMENTS=config.segments,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


def _whole(sources: Sequence[int], config: Config) -> tuple[bool, bool]:
    first, second = [c % config.block_k == 0 for c in (*sources, 0)][:2]
    return first, second


def _flat(t: Tensor | None) -> Tensor | None:
    """The image as one of [1, C, N · P], where its positions are evenly spaced over all samples."""
    if t is None:
        return None
    moved = t.movedim(1, -1)
    try:
        return moved.view(1, -1, moved.shape[-1]).movedim(-1, 1)
    except RuntimeError:
        return None


def _shifts(dims: int, resample: str | None) -> tuple[int, int, int]:
    """By how many bits the coordinates of an upsampled input are shifted to those of the input."""
    up = int(resample == "nearest")
    return 0, up if dims > 1 else 0, up


def _image(t: Tensor | None) -> tuple:
    """An image, and its strides along samples, depth, height and width."""
    return (None, 0, 0, 0, 0) if t is None else (t, t.stride(0), *in_three(t.stride()[2:], 0))


def _rows(t: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if t is None else (t, t.stride(0))


def _unit(t: Tensor | None) -> int:
    """The power of two, up to 16 bytes, of which all distances between vectors of channels are multiples."""
    if t is None:
        return 1
    strides = [t.stride(d) for d in range(t.ndim) if d != 1 and t.shape[d] > 1]
    return math.gcd(16 // t.element_size(), *strides)


def _last(t: Tensor | None) -> Tensor | None:
    return t if t is None or channels_adjoin(t) else channels_last(t)


def _row(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    t = t.float()
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
