"""Moments of channels, and the fold of group norm: how the kernels divide the work is in moments.py."""

import triton
import triton.language as tl

from .group_norm_tiles import (
    extents,
    load_affine,
    load_float,
    rows_step,
    subtract,
    tile_mask,
    tile_pointers,
)
from .moments_tiles import fold_groups, is_last, merge_slots


@triton.jit
def channel_moments_kernel(
    x, x_n, x_c, x_p, channels, positions, rows, moments, slots, counters,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Write the moments of BLOCK_C channels: of all positions, or of a split of them until the last one merges all."""
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, _, positions = extents(channels, 0, positions, VECTOR, CHANNELS_LAST)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    valid = None if WHOLE else c < channels
    begin = split.to(tl.int64) * rows
    stop = tl.minimum(begin + rows, positions)

    # Sums relative to the first value of the split: with a mean far from 0 the squares would lose the variance.
    at = tile_pointers(x, x_n, x_c, x_p, n, c, begin + tl.arange(0, 1), VECTOR, CHANNELS_LAST)
    origin = load_float(at, None if valid is None else valid[None, :])
    at = tile_pointers(x, x_n, x_c, x_p, n, c, begin + tl.arange(0, BLOCK_P), VECTOR, CHANNELS_LAST)
    step = rows_step(x_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, stop, BLOCK_P * UNROLL):
        tiles = ()  # type: tuple
        for i in tl.static_range(UNROLL):
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tiles += (load_float(at, mask),)
            at += step
        for i in tl.static_range(UNROLL):
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            difference = subtract(tiles[i], origin, mask)
            total += difference
            squares += difference * difference
    count = (stop - begin).to(tl.float32)
    total = tl.sum(total, 0)
    deviation = tl.maximum(tl.sum(squares, 0) - total * (total / count), 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean = tl.sum(origin, 0) + total / count

    out = moments + n * 2 * channels + c
    if slots is None:
        tl.store(out, mean, mask=valid)
        tl.store(out + channels, deviation, mask=valid)
    else:
        splits = tl.num_programs(2)
        base = slots + n * splits * 2 * channels
        slot = base + split.to(tl.int64) * 2 * channels + c
        tl.store(slot, mean, mask=valid)
        tl.store(slot + channels, deviation, mask=valid)
        if is_last(counters + n * tl.num_programs(1) + tl.program_id(1), splits, AMD):
            mean, deviation = merge_slots(base + c, channels, valid, splits, rows, positions, BLOCK_S)
            tl.store(out, mean, mask=valid)
            tl.store(out + channels, deviation, mask=valid)


@triton.jit
def fold_group_norm_kernel(
    first, second, first_channels, second_channels, size, num_groups, per_group, add, add_n, weight, bias,
    scale, scale_n, shift, shift_n, eps, gain, offset,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write gain and offset of the channels of GROUPS groups."""
    n = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    here = groups < num_groups
    mean, rstd = fold_groups(
        first, second, first_channels, second_channels, size, add, add_n, eps, n, groups, here, per_group, WIDTH
    )  # fmt: skip
    lane = tl.arange(0, WIDTH)
    c = (groups * per_group)[:, None] + lane[None, :]
    valid = here[:, None] & (lane < per_group)[None, :]
    factor, constant = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    factor *= rstd[:, None]
    centre = tl.broadcast_to(mean[:, None], [GROUPS, WIDTH])
    if add is not None:
        centre -= load_float(add + n * add_n + c, valid)
    out = n * (num_groups * per_group) + c
    tl.store(gain + out, factor, mask=valid)
    tl.store(offset + out, constant - centre * factor, mask=valid)
