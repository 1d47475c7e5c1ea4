"""Layer norm and RMS norm over channels on the GPU: `cmfast.kernels.channel_norm`, in one launch.

A program takes a tile of positions with all of their channels, which it reads once and holds in registers. Where they
are too many, or positions are innermost in memory (NCHW), it reads them in blocks: once for the mean, once for the mean
square and once to write, and all but the first time from the cache. Tiles are chosen by the channels alone: the results
of a position do not depend on how many others there are.
"""

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import Operand, in_order, make_operand, make_output
from .attention_tiles import narrow
from .group_norm_grid import Problem, argument, rows, vectors, warps_for
from .group_norm_tiles import (
    extents,
    load_affine,
    load_float,
    subtract,
    tile_mask,
    tile_pointers,
)
from .launch import Launch, architecture, lanes

#: Elements of a tile, unless one position has more channels: 8 for each thread of 4 warps.
_TILE = 1024
#: Channels that one program may hold in registers: 32 for each thread of 8 warps.
_RESIDENT = 8192
#: Positions and channels of a block where positions are innermost.
_PLANES = (64, 32)


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
    """Return y in the dtype and memory format of x; arguments are those of the reference."""
    launches, y = plan_channel_norm(x, weight, bias, eps, centred, least, scale, shift, silu)
    for launch in launches:
        launch.run()
    return in_order(y, x)


def plan_channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    least: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    *,
    arch: str | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of `channel_norm`, and the output that they fill. Needs no device and reads no data.

    `arch` is the architecture to plan for, "sm_90" or "gfx942" say; None means that of the device of x.
    """
    y = make_output(x, x.shape)
    if not x.numel():
        return [], y.tensor
    problem = Problem((make_operand(x, y.tensor),), y, 1)
    n, c, p = problem.shape
    last, vector, per_warp = problem.channels_last, problem.vector(), lanes(arch or architecture(x.device))
    if p == 1 and scale is None and shift is None:  # tokens are positions of one sample
        problem = dataclasses.replace(problem, x=(_as_positions(problem.x[0]),), out=_as_positions(y))
        n, p = 1, n
    block_p, block_c = _blocks(c) if last else _PLANES
    whole = c % block_c == 0 and p % block_p == 0
    return [
        Launch(
            channel_norm_kernel,
            (n * triton.cdiv(p, block_p),),
            (
                *argument(problem.x[0], vector, last),
                *argument(problem.out, vector, last),
                *((c // vector, p) if last else (c, p // vector)),
                *(*vectors(weight, bias), *rows(scale), *rows(shift), eps, least),
            ),
            dict(
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                VECTOR=vector,
                CHANNELS_LAST=last,
                RESIDENT=c <= block_c,
                WHOLE=whole,
                CENTRED=centred,
                SILU=silu,
            ),
            warps_for(block_p * block_c, 8, per_warp),
        )
    ], y.tensor


def _as_positions(x: Operand) -> Operand:
    """Samples of one position as positions of one sample."""
    n, c, _ = x.strides
    return Operand(x.tensor, (0, c, n))


def _blocks(channels: int) -> tuple[int, int]:
    """Positions and channels of a tile whose channels are innermost."""
    block_c = triton.next_power_of_2(channels)
    return (max(1, _TILE // block_c), block_c) if block_c <= _RESIDENT else (1, _RESIDENT // 2)


@triton.jit
def channel_norm_kernel(
    x, x_n, x_c, x_p, y, y_n, y_c, y_p, channels, positions, weight, bias, scale, scale_n, shift, shift_n, eps, least,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RESIDENT: tl.constexpr, WHOLE: tl.constexpr, CENTRED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_P positions of y."""
    channels, _, positions = extents(channels, 0, positions, VECTOR, CHANNELS_LAST)
    tiles = tl.cdiv(positions, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * BLOCK_P
    p = begin + tl.arange(0, BLOCK_P).to(tl.int64)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    mean = tl.zeros([BLOCK_P, 1], tl.float32)
    if CENTRED:  # relative to the first channel, since a large mean leaves few digits for the differences
        first = tile_pointers(x, x_n, x_c, x_p, n, tl.zeros([1], tl.int64), p, VECTOR, CHANNELS_LAST)
        mean = load_float(first, (p < positions)[:, None])
    squares = tl.zeros([BLOCK_P, 1], tl.float32)
    if RESIDENT:
        valid = None if WHOLE else c < channels
        mask = None if WHOLE else tile_mask(begin, positions, valid, BLOCK_P)
        u = load_float(tile_pointers(x, x_n, x_c, x_p, n, c, p, VECTOR, CHANNELS_LAST), mask)
        if CENTRED:
            mean += tl.sum(subtract(u, mean, mask), 1, keep_dims=True) / channels
            u = subtract(u, mean, mask)
        squares += tl.sum(u * u, 1, keep_dims=True)
        factor = tl.rsqrt(tl.maximum(squares / channels, least, propagate_nan=tl.PropagateNan.ALL) + eps)
        gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
        _write(y, y_n, y_c, y_p, n, c, p, u * factor, gain, offset, mask, VECTOR, CHANNELS_LAST, SILU)
    else:
        if CENTRED:
            total = tl.zeros([BLOCK_P, 1], tl.float32)
            for start in range(0, channels, BLOCK_C):
                mask = None if WHOLE else tile_mask(begin, positions, start + c < channels, BLOCK_P)
                u = load_float(tile_pointers(x, x_n, x_c, x_p, n, start + c, p, VECTOR, CHANNELS_LAST), mask)
                total += tl.sum(subtract(u, mean, mask), 1, keep_dims=True)
            mean += total / channels
        for start in range(0, channels, BLOCK_C):
            mask = None if WHOLE else tile_mask(begin, positions, start + c < channels, BLOCK_P)
            u = load_float(tile_pointers(x, x_n, x_c, x_p, n, start + c, p, VECTOR, CHANNELS_LAST), mask)
            u = subtract(u, mean, mask)
            squares += tl.sum(u * u, 1, keep_dims=True)
        factor = tl.rsqrt(tl.maximum(squares / channels, least, propagate_nan=tl.PropagateNan.ALL) + eps)
        for start in range(0, channels, BLOCK_C):
            valid = None if WHOLE else start + c < channels
            mask = None if WHOLE else tile_mask(begin, positions, valid, BLOCK_P)
            u = load_float(tile_pointers(x, x_n, x_c, x_p, n, start + c, p, VECTOR, CHANNELS_LAST), mask)
            gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, start + c, valid)
            u = (u - mean) * factor
            _write(y, y_n, y_c, y_p, n, start + c, p, u, gain, offset, mask, VECTOR, CHANNELS_LAST, SILU)


@triton.jit
def _write(
    y, y_n, y_c, y_p, n, c, p, u, gain, offset, mask, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Write a tile of y, what is normalised with its gain, its offset and SiLU."""
    z = u * gain[None, :] + offset[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    pointers = tile_pointers(y, y_n, y_c, y_p, n, c, p, VECTOR, CHANNELS_LAST)
    tl.store(pointers, narrow(z, y.dtype.element_ty), mask=mask)
