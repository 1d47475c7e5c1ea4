"""Group normalisation on the GPU: `cmfast.kernels.group_norm`, whose file states the formula, and its gradient.

    u = x + add,  û = (u - mean_g) · rstd_g,  z = û · gain + offset,  y = z or z · sigmoid(z)
    gain = weight · (1 + scale),  offset = bias · (1 + scale) + shift              for each sample and channel

x [N, C, P], P the number of positions, is read where it lies: channels innermost (NHWC) or positions innermost (NCHW),
one tensor or a pair. Since all but x is constant over the positions of a channel, z is one multiply-add of x.

Forward, two kernels. A program of `_statistics_kernel` takes BLOCK_C channels and a share (a split) of the positions,
and writes the mean and the sum of squared deviations of each group's part in them to a slot of its own.
`_apply_kernel`, on the same grid, merges the slots of the groups it touches, always in the same order, and writes y.
Where all positions of whole groups fit into the registers of a program, `_resident_kernel` does both and reads x once.

Backward, two kernels on such a grid: with dz = dy · activation'(z) and D channels a group,

    dx = rstd_g · (gain · dz - Σ_g gain·dz / (D·P) - û · Σ_g gain·dz·û / (D·P))

`_sums_kernel` writes Σ dz and Σ dz·û of each split and channel, and what they add to the group's two sums;
`_gradient_kernel` merges those and writes dx, and its programs of the first split the sums of each channel.

A tile is [BLOCK_P, BLOCK_C], 16 bytes of it to a thread, and UNROLL of them are in flight at a time. Channels
innermost, a tile takes 32 to 128 bytes of each position, whatever the size of a group, whose channels rarely start at a
multiple of 16 bytes; positions innermost, it takes one channel. No atomics: a slot has one writer, so results are
bit-identical from run to run.
"""

import dataclasses
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_in_order, to_order
from .launch import Launch

# Programs that a launch should have at least: two for each of an H100's 132 multiprocessors. A constant, so that
# results do not depend on the device.
PROGRAMS = 264
# A program of the two-kernel path with more elements of x than this would share the work unevenly ...
MOST_ELEMENTS = 16384
# ... and with fewer it would move more slots than data.
LEAST_ELEMENTS = 2048
# Elements (with the padding to powers of two) that one program may hold in registers: 64 a thread with 8 warps.
RESIDENT_ELEMENTS = 16384


@triton.jit
def _tile(x, stride_n, stride_c, stride_p, n, c, p, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pointers [P, C] to the channels c and positions p of sample n.

    The strides of all but the innermost dimension come divided by VECTOR: the compiler knows of a runtime value only
    whether 16 divides it, and the product here tells it that each row starts at a whole vector. n, c and p are 64-bit.
    """
    C_UNIT: tl.constexpr = 1 if CHANNELS_LAST else VECTOR
    P_UNIT: tl.constexpr = VECTOR if CHANNELS_LAST else 1
    return x + n * stride_n * VECTOR + (c * stride_c * C_UNIT)[None, :] + (p * stride_p * P_UNIT)[:, None]


@triton.jit
def _extents(channels, first_channels, positions, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The extents in elements: for the same reason those of the innermost dimension come in vectors."""
    if CHANNELS_LAST:
        return channels * VECTOR, first_channels * VECTOR, positions
    else:
        return channels, first_channels, positions * VECTOR


@triton.jit
def _step(stride_p, rows, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """What leads from a pointer to the one `rows` positions on."""
    UNIT: tl.constexpr = VECTOR if CHANNELS_LAST else 1
    return tl.cast(stride_p, tl.int64) * (rows * UNIT)


@triton.jit
def _input(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, n, first, c, p, rows,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr,
):  # fmt: skip
    """Where to read x at the channels c (`first` and on) and positions p: pointers and the step of `rows` positions.

    Of a pair (h, skip) a tile lies in one or the other, unless SEAM: then the second pointers and step are those of
    skip, and `_load_input` takes each channel from its own.
    """
    x, step = _tile(h, h_n, h_c, h_p, n, c, p, VECTOR, CHANNELS_LAST), _step(h_p, rows, VECTOR, CHANNELS_LAST)
    others, other_step = x, step
    if skip is not None:
        others = _tile(skip, skip_n, skip_c, skip_p, n, c - first_channels, p, VECTOR, CHANNELS_LAST)
        other_step = _step(skip_p, rows, VECTOR, CHANNELS_LAST)
        if not SEAM:
            x, step = tl.where(first < first_channels, x, others), tl.where(first < first_channels, step, other_step)
    return x, step, others, other_step


@triton.jit
def _load_input(x, others, c, first_channels, mask, SEAM: tl.constexpr):
    if SEAM:
        in_h = (c < first_channels)[None, :]
        if mask is None:
            mask = tl.full([1, 1], True, tl.int1)
        return tl.where(in_h, _load(x, mask & in_h), _load(others, mask & (c >= first_channels)[None, :]))
    else:
        return _load(x, mask)


@triton.jit
def _difference(x, offset, mask):
    """The difference x - offset, 0 where the mask has no element."""
    if mask is None:
        return x - offset
    else:
        return tl.where(mask, x - offset, 0.0)


@triton.jit
def _exist(c, end, WHOLE: tl.constexpr):
    """Which channels exist; None, which costs nothing, where the tiles divide x (WHOLE)."""
    if WHOLE:
        return None
    else:
        return c < end


@triton.jit
def _mask(start, positions, valid, BLOCK_P: tl.constexpr):
    """Which elements of the tile at `start` exist."""
    if valid is None:
        return None
    else:
        return (start + tl.arange(0, BLOCK_P) < positions)[:, None] & valid[None, :]


@triton.jit
def _load(x, mask):
    if mask is None:
        return tl.load(x).to(tl.float32)
    else:
        return tl.load(x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row(x, n, stride_n, c, valid):
    """Row n of a parameter [N, C] at the channels c, in float32."""
    return _load(x + n * stride_n + c, valid)


@triton.jit
def _gain_offset(weight, bias, scale, scale_n, shift, shift_n, n, c, valid):
    gain = tl.full([c.shape[0]], 1.0, tl.float32)
    offset = tl.zeros([c.shape[0]], tl.float32)
    if weight is not None:
        gain = _row(weight, 0, 0, c, valid)
    if bias is not None:
        offset = _row(bias, 0, 0, c, valid)
    if scale is not None:
        film = 1.0 + _row(scale, n, scale_n, c, valid)
        gain, offset = gain * film, offset * film
    if shift is not None:
        offset += _row(shift, n, shift_n, c, valid)
    return gain, offset


@triton.jit
def _output(x, added, mean, gain, offset, out, SILU: tl.constexpr):
    """The output in the dtype of `out`: z = (x + added - mean) · gain + offset and SiLU, z / (1 + 2^(-z · log2 e)).

    16-bit outputs leave room for the rounding of what the difference cancels: there z is one multiply-add of x. So is
    t = -z · log2 e, and z / (1 + 2^t) = t / (-log2 e - log2 e · 2^t).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    dtype = out.dtype.element_ty
    if dtype == tl.float32:
        z = (x + added[None, :] - mean[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        return z
    else:
        offset += (added - mean) * gain
        if SILU:
            t = x * (gain * -LOG2E)[None, :] + (offset * -LOG2E)[None, :]
            return (t / (tl.exp2(t) * -LOG2E - LOG2E)).to(dtype)
        else:
            return (x * gain[None, :] + offset[None, :]).to(dtype)


@triton.jit
def _silu_backward(dy, z):
    """The gradient dy · s · (1 + z · (1 - s)) with s = sigmoid(z), where 1 - s = e · s does not cancel."""
    e = tl.minimum(tl.exp(-z), 1e37)
    s = 1.0 / (1.0 + e)
    return dy * s * (1.0 + z * (e * s))


@triton.jit
def _groups(first, end, per_group, GROUPS: tl.constexpr):
    """The groups that have channels in [first, end): their indices [GROUPS], and which of these are meant."""
    groups = first // per_group + tl.arange(0, GROUPS)
    return groups, groups * per_group < end


@triton.jit
def _index(first, per_group, RUNS: tl.constexpr, RUN: tl.constexpr):
    """The group of each run of RUN channels, `first` and on, counted from the first channel's: [RUNS].

    RUN divides the channels of a group and of a tile. So a run lies in one group, and what is summed over groups, or
    the same in all of one, is kept once a run.
    """
    c = first % per_group + tl.arange(0, RUNS) * RUN
    return ((c + 0.5) / per_group).to(tl.int32)  # exact, and a fraction of what dividing integers costs


@triton.jit
def _over_positions(value, RUN: tl.constexpr):
    """Sum [P, C] to a value of each run: first over the run, which one thread holds."""
    return tl.sum(tl.sum(tl.reshape(value, [value.shape[0], value.shape[1] // RUN, RUN]), 2), 0)


@triton.jit
def _down(value):
    """Sum [P, C] over the positions, in two stages: the order in which one would add does not matter so much."""
    FEW: tl.constexpr = value.shape[0] if value.shape[0] < 16 else 16
    return tl.sum(tl.sum(tl.reshape(value, [value.shape[0] // FEW, FEW, value.shape[1]]), 1), 0)


@triton.jit
def _over_channels(value, RUN: tl.constexpr):
    """Sum [C] to a value of each run."""
    return tl.sum(tl.reshape(value, [value.shape[0] // RUN, RUN]), 1)


@triton.jit
def _to_channels(value, RUN: tl.constexpr):
    """Give each channel the value of its run."""
    return tl.reshape(tl.broadcast_to(value[:, None], [value.shape[0], RUN]), [value.shape[0] * RUN])


@triton.jit
def _over_runs(value, index, GROUPS: tl.constexpr):
    """Sum a value of each run over each group [GROUPS]."""
    return tl.sum(tl.where(index[None, :] == tl.arange(0, GROUPS)[:, None], value[None, :], 0.0), 1)


@triton.jit
def _to_runs(value, index):
    """Give each run the value of its group [GROUPS]; runs past the last channel get any."""
    return tl.gather(value, tl.minimum(index, value.shape[0] - 1), 0)


@triton.jit
def _added(add, n, add_n, c, valid):
    """The row of `add`, or zeros."""
    if add is not None:
        return _row(add, n, add_n, c, valid)
    else:
        return tl.zeros([c.shape[0]], tl.float32)


@triton.jit
def _write_slots(first, second, firsts, seconds, n, groups, here, split, num_groups, per_group,
                 BLOCK_C: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Write two values of each group's part in this tile to their slots, each [N, G, PARTS, SPLITS].

    Slots are read four at a time: the last split also writes zeros up to a multiple of four.
    """
    part = tl.program_id(1) - groups * per_group // BLOCK_C
    slot = ((n * num_groups + groups) * PARTS + part) * SPLITS + split
    tl.store(firsts + slot, first, mask=here)
    tl.store(seconds + slot, second, mask=here)
    if split == tl.num_programs(2) - 1:
        ahead = tl.arange(0, 4)[None, :]
        mask = here[:, None] & (ahead > 0) & (split % 4 + ahead < 4)
        zeros = tl.zeros([groups.shape[0], 4], tl.float32)
        tl.store(firsts + slot[:, None] + ahead, zeros, mask=mask)
        tl.store(seconds + slot[:, None] + ahead, zeros, mask=mask)


@triton.jit
def _read_slots(firsts, seconds, n, groups, here, num_groups, per_group, positions, rows,
                BLOCK_C: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Both values of each slot of the groups, and how many elements of x each stands for: [GROUPS, PARTS, SPLITS].

    Slots that stand for none give 0.
    """
    begin = (groups * per_group)[:, None, None]
    part = tl.arange(0, PARTS)[None, :, None]
    tile = (begin // BLOCK_C + part) * BLOCK_C
    width = tl.minimum(tile + BLOCK_C, begin + per_group) - tl.maximum(tile, begin)
    width = tl.where(here[:, None, None], tl.maximum(width, 0), 0)
    split = tl.arange(0, SPLITS)[None, None, :]
    last = tl.num_programs(2) - 1
    remainder = tl.cast(positions - last.to(tl.int64) * rows, tl.float32)
    height = tl.where(split < last, tl.cast(rows, tl.float32), tl.where(split == last, remainder, 0.0))
    filled = (width > 0) & (split < (last // 4 + 1) * 4)
    slot = ((n * num_groups + groups[:, None, None]) * PARTS + part) * SPLITS + split
    first = tl.load(firsts + slot, mask=filled, other=0.0)
    second = tl.load(seconds + slot, mask=filled, other=0.0)
    return first, second, width.to(tl.float32) * height


@triton.jit
def _over_slots(value):
    return tl.sum(tl.sum(value, 2), 1)


@triton.jit
def _statistics_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_means, slot_deviations,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = _extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = _exist(c, end, WHOLE)
    groups, here = _groups(first, end, per_group, GROUPS)
    index = _index(first, per_group, BLOCK_C // RUN, RUN)
    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = _input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip

    # Sums relative to a value of the run: with a mean far from 0 the squares would lose the variance. It comes from
    # the first tile, so that nothing is read twice.
    tiles = ()  # type: tuple
    for i in tl.static_range(UNROLL):
        mask = _mask(begin + i * BLOCK_P, positions, valid, BLOCK_P)
        tiles += (_load_input(x, others, c, first_channels, mask, SEAM),)
        x += step
        if SEAM:
            others += other_step
    origin = _over_positions(tl.where((tl.arange(0, BLOCK_P) == 0)[:, None], tiles[0], 0.0), RUN) / RUN
    if add is not None:
        added = _row(add, n, add_n, c, valid)
        origin += _over_channels(added, RUN) / RUN
        offset = (_to_channels(origin, RUN) - added)[None, :]
    else:
        offset = _to_channels(origin, RUN)[None, :]

    total = _difference(tiles[0], offset, _mask(begin, positions, valid, BLOCK_P))
    squares = total * total
    for i in tl.static_range(1, UNROLL):
        difference = _difference(tiles[i], offset, _mask(begin + i * BLOCK_P, positions, valid, BLOCK_P))
        total += difference
        squares += difference * difference
    stop = tl.minimum(begin + rows, positions)
    for start in range(begin + BLOCK_P * UNROLL, stop, BLOCK_P * UNROLL):
        for i in tl.static_range(UNROLL):
            later = _mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            difference = _difference(_load_input(x, others, c, first_channels, later, SEAM), offset, later)
            total += difference
            squares += difference * difference
            x += step
            if SEAM:
                others += other_step

    count = (stop - begin).to(tl.float32) * RUN
    total = _over_positions(total, RUN)
    deviation = tl.maximum(_over_positions(squares, RUN) - total * (total / count), 0.0)
    mean = origin + total / count

    # The runs of a group have means of their own: its squared deviations are theirs and those of their means (Chan,
    # Golub and LeVeque 1979).
    runs = (tl.minimum(groups * per_group + per_group, end) - tl.maximum(groups * per_group, first)) // RUN
    group_mean = _over_runs(mean, index, GROUPS) / tl.maximum(runs, 1)
    apart = mean - _to_runs(group_mean, index)
    deviation = _over_runs(deviation + count * apart * apart, index, GROUPS)
    _write_slots(group_mean, deviation, slot_means, slot_deviations, n, groups, here, split, num_groups, per_group,
                 BLOCK_C, PARTS, SPLITS)  # fmt: skip


@triton.jit
def _apply_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_means, slot_deviations,
    y, y_n, y_c, y_p, mean_out, rstd_out, weight, bias, scale, scale_n, shift, shift_n, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = _extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = _exist(c, end, WHOLE)
    groups, here = _groups(first, end, per_group, GROUPS)
    index = _index(first, per_group, BLOCK_C // RUN, RUN)

    # Merge relative to the group's first slot, for the same reason as in the sums.
    means, deviations, counts = _read_slots(slot_means, slot_deviations, n, groups, here, num_groups, per_group,
                                            positions, rows, BLOCK_C, PARTS, SPLITS)  # fmt: skip
    size = tl.cast(per_group, tl.float32) * tl.cast(positions, tl.float32)
    origin = tl.load(slot_means + (n * num_groups + groups) * (PARTS * SPLITS), mask=here, other=0.0)
    mean = origin + _over_slots(counts * (means - origin[:, None, None])) / size
    apart = means - mean[:, None, None]
    rstd = tl.rsqrt(_over_slots(deviations + counts * apart * apart) / size + eps)
    if split == 0:
        starts_here = (groups * per_group // BLOCK_C == tl.program_id(1)) & here
        tl.store(mean_out + n * num_groups + groups, mean, mask=starts_here)
        tl.store(rstd_out + n * num_groups + groups, rstd, mask=starts_here)

    gain, offset = _gain_offset(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    gain *= _to_channels(_to_runs(rstd, index), RUN)
    mean = _to_channels(_to_runs(mean, index), RUN)
    added = _added(add, n, add_n, c, valid)

    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = _input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    out = _tile(y, y_n, y_c, y_p, n, c, p, VECTOR, CHANNELS_LAST)
    out_step = _step(y_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    for start in range(begin, tl.minimum(begin + rows, positions), BLOCK_P * UNROLL):
        # All loads first: none may pass a store, which could write what it reads.
        tiles = ()  # type: tuple
        for i in tl.static_range(UNROLL):
            mask = _mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tiles += (_load_input(x, others, c, first_channels, mask, SEAM),)
            x += step
            if SEAM:
                others += other_step
        for i in tl.static_range(UNROLL):
            value = _output(tiles[i], added, mean, gain, offset, y, SILU)
            tl.store(out, value, mask=_mask(start + i * BLOCK_P, positions, valid, BLOCK_P))
            out += out_step


@triton.jit
def _resident_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, width,
    add, add_n, y, y_n, y_c, y_p, mean_out, rstd_out, weight, bias, scale, scale_n, shift, shift_n, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr,
    GROUPS: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    channels, first_channels, positions = _extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    width = width * VECTOR if CHANNELS_LAST else width
    first = tl.program_id(1) * width
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + width, channels)
    valid = _exist(c, end, WHOLE)
    groups, here = _groups(first, end, per_group, GROUPS)
    index = _index(first, per_group, BLOCK_C // RUN, RUN)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    mask = _mask(0, positions, valid, BLOCK_P)
    x, _, others, _ = _input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    x = _load_input(x, others, c, first_channels, mask, SEAM)

    # Two passes over the registers: the mean, then how x differs from it, which also tells what rounding left of it.
    if add is not None:
        x += _row(add, n, add_n, c, valid)[None, :]
        if mask is not None:
            x = tl.where(mask, x, 0.0)
    size = tl.cast(per_group, tl.float32) * tl.cast(positions, tl.float32)
    mean = _over_runs(_over_positions(x, RUN), index, GROUPS) / size
    difference = _difference(x, _to_channels(_to_runs(mean, index), RUN)[None, :], mask)
    rest = _over_runs(_over_positions(difference, RUN), index, GROUPS) / size
    variance = _over_runs(_over_positions(difference * difference, RUN), index, GROUPS) / size - rest * rest
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    tl.store(mean_out + n * num_groups + groups, mean + rest, mask=here)
    tl.store(rstd_out + n * num_groups + groups, rstd, mask=here)

    gain, offset = _gain_offset(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    gain *= _to_channels(_to_runs(rstd, index), RUN)
    rest = _to_channels(_to_runs(rest, index), RUN)
    value = _output(difference, tl.zeros([BLOCK_C], tl.float32), rest, gain, offset, y, SILU)
    out = _tile(y, y_n, y_c, y_p, n, c, p, VECTOR, CHANNELS_LAST)
    tl.store(out, value, mask=mask)


@triton.jit
def _sums_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_dz, slot_dzu,
    grad, grad_n, grad_c, grad_p, mean, rstd, weight, bias, scale, scale_n, shift, shift_n, channel_dz, channel_dzu,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = _extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = _exist(c, end, WHOLE)
    groups, here = _groups(first, end, per_group, GROUPS)
    index = _index(first, per_group, BLOCK_C // RUN, RUN)
    gain, offset = _gain_offset(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    rstd = tl.load(rstd + n * num_groups + groups, mask=here, other=0.0)
    a = _to_channels(_to_runs(rstd, index), RUN)
    mean = tl.load(mean + n * num_groups + groups, mask=here, other=0.0)
    mean = _to_channels(_to_runs(mean, index), RUN)
    added = _added(add, n, add_n, c, valid)

    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = _input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    dy = _tile(grad, grad_n, grad_c, grad_p, n, c, p, VECTOR, CHANNELS_LAST)
    dy_step = _step(grad_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    dz_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dzu_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, tl.minimum(begin + rows, positions), BLOCK_P * UNROLL):
        for i in tl.static_range(UNROLL):
            mask = _mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            u = _load_input(x, others, c, first_channels, mask, SEAM) + added[None, :]
            u = (u - mean[None, :]) * a[None, :]
            dz = _load(dy, mask)
            if SILU:
                dz = _silu_backward(dz, u * gain[None, :] + offset[None, :])
            dz_sum += dz
            dzu_sum += dz * u
            x += step
            dy += dy_step
            if SEAM:
                others += other_step

    dz_sum, dzu_sum = _down(dz_sum), _down(dzu_sum)
    at = (n * tl.num_programs(2) + split) * channels + c
    tl.store(channel_dz + at, dz_sum, mask=c < channels)
    tl.store(channel_dzu + at, dzu_sum, mask=c < channels)
    dz_sum = _over_runs(_over_channels(gain * dz_sum, RUN), index, GROUPS)
    dzu_sum = _over_runs(_over_channels(gain * dzu_sum, RUN), index, GROUPS)
    _write_slots(dz_sum, dzu_sum, slot_dz, slot_dzu, n, groups, here, split, num_groups, per_group,
                 BLOCK_C, PARTS, SPLITS)  # fmt: skip


@triton.jit
def _gradient_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_dz, slot_dzu,
    grad, grad_n, grad_c, grad_p, mean, rstd, weight, bias, scale, scale_n, shift, shift_n, channel_dz, channel_dzu,
    dx, dx_n, dx_c, dx_p, dz_sum, dzu_sum,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = _extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = _exist(c, end, WHOLE)
    groups, here = _groups(first, end, per_group, GROUPS)
    index = _index(first, per_group, BLOCK_C // RUN, RUN)
    if split == 0:
        total = tl.zeros([BLOCK_C], tl.float32)
        total_u = tl.zeros([BLOCK_C], tl.float32)
        at = n * tl.num_programs(2) * channels + c
        for _ in range(tl.num_programs(2)):
            total += tl.load(channel_dz + at, mask=c < channels, other=0.0)
            total_u += tl.load(channel_dzu + at, mask=c < channels, other=0.0)
            at += channels
        tl.store(dz_sum + n * channels + c, total, mask=c < channels)
        tl.store(dzu_sum + n * channels + c, total_u, mask=c < channels)

    dz_slots, dzu_slots, _ = _read_slots(slot_dz, slot_dzu, n, groups, here, num_groups, per_group, positions, rows,
                                         BLOCK_C, PARTS, SPLITS)  # fmt: skip
    size = tl.cast(per_group, tl.float32) * tl.cast(positions, tl.float32)
    gain, offset = _gain_offset(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    rstd = tl.load(rstd + n * num_groups + groups, mask=here, other=0.0)
    a = _to_channels(_to_runs(rstd, index), RUN)
    mean = tl.load(mean + n * num_groups + groups, mask=here, other=0.0)
    mean = _to_channels(_to_runs(mean, index), RUN)
    added = _added(add, n, add_n, c, valid)
    constant = -a * _to_channels(_to_runs(_over_slots(dz_slots) / size, index), RUN)
    slope = -a * _to_channels(_to_runs(_over_slots(dzu_slots) / size, index), RUN)

    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = _input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    dy = _tile(grad, grad_n, grad_c, grad_p, n, c, p, VECTOR, CHANNELS_LAST)
    dy_step = _step(grad_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    out = _tile(dx, dx_n, dx_c, dx_p, n, c, p, VECTOR, CHANNELS_LAST)
    out_step = _step(dx_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    for start in range(begin, tl.minimum(begin + rows, positions), BLOCK_P * UNROLL):
        tiles = ()  # type: tuple
        for i in tl.static_range(UNROLL):
            mask = _mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tiles += (_load_input(x, others, c, first_channels, mask, SEAM), _load(dy, mask))
            x += step
            dy += dy_step
            if SEAM:
                others += other_step
        for i in tl.static_range(UNROLL):
            u = (tiles[2 * i] + added[None, :] - mean[None, :]) * a[None, :]
            dz = tiles[2 * i + 1]
            if SILU:
                dz = _silu_backward(dz, u * gain[None, :] + offset[None, :])
            du = dz * (a * gain)[None, :] + (u * slope[None, :] + constant[None, :])
            tl.store(out, du.to(dx.dtype.element_ty), mask=_mask(start + i * BLOCK_P, positions, valid, BLOCK_P))
            out += out_step


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A tensor that is read or written in tiles, and its strides along samples, channels and positions."""

    tensor: Tensor
    strides: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What a call comes down to: x (one operand or a pair) as [N, C, P], and where its result goes."""

    x: tuple[_Operand, ...]
    out: _Operand
    num_groups: int

    @property
    def shape(self) -> tuple[int, int, int]:
        n, c, *spatial = self.out.tensor.shape
        return n, c, math.prod(spatial)

    @property
    def per_group(self) -> int:
        return self.out.tensor.shape[1] // self.num_groups

    @property
    def sector(self) -> int:
        """Elements in 32 bytes, the least that memory moves."""
        return 32 // self.out.tensor.element_size()

    @property
    def channels_last(self) -> bool:
        _, c, p = self.shape
        return p == 1 or (c > 1 and self.out.strides[1] < self.out.strides[2])

    def seam(self, width: int) -> bool:
        """Whether a tile of `width` channels, counted from the first, may have channels of both tensors of a pair."""
        return len(self.x) == 2 and self.x[0].tensor.shape[1] % width != 0

    def vector(self, *others: _Operand, width: int = 0) -> int:
        """The largest vector, up to 16 bytes, of which every row of every operand and every extent is a multiple."""
        _, _, p = self.shape
        extents = [x.tensor.shape[1] for x in self.x] + [width] if self.channels_last else [p]
        strides = []
        for x in (*self.x, self.out, *others):
            strides += [x.strides[0], x.strides[2 if self.channels_last else 1]]
        return math.gcd(self.sector // 2, *extents, *strides)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How two kernels divide [N, C, P]: BLOCK_C channels and `rows` positions a program, BLOCK_P of them at a time."""

    block_p: int
    block_c: int
    unroll: int
    rows: int
    programs: tuple[int, int, int]
    groups: int
    parts: int
    run: int
    whole: bool
    num_warps: int

    @property
    def splits(self) -> int:
        return self.programs[2]

    @property
    def slots(self) -> int:
        """Slots of a part, at least the four that are read at a time."""
        return max(4, triton.next_power_of_2(self.splits))

    def constants(self) -> dict[str, int]:
        return dict(
            BLOCK_P=self.block_p,
            BLOCK_C=self.block_c,
            UNROLL=self.unroll,
            GROUPS=self.groups,
            PARTS=self.parts,
            SPLITS=self.slots,
            RUN=self.run,
            WHOLE=self.whole,
        )


def group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [N, C, *spatial], and the mean and 1/√(variance + eps) of each group [N, num_groups]."""
    launches, (y, mean, rstd) = plan_group_norm(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    for launch in launches:
        launch.run()
    return _in_order(y, h), mean, rstd


def group_norm_backward(
    grad: Tensor,
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [N, C, *spatial], Σ dz and Σ dz·û [N, C]: z the value before the activation, û the normalised input."""
    launches, (dx, dz_sum, dzu_sum) = plan_group_norm_backward(
        grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd
    )
    for launch in launches:
        launch.run()
    return _in_order(dx, h), dz_sum, dzu_sum


def plan_group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches of `group_norm`, and the outputs that they fill. Needs no device and reads no data."""
    problem = _problem(h, skip, num_groups)
    n, c, p = problem.shape
    mean = h.new_empty((n, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    outputs = (problem.out.tensor, mean, rstd)
    if not problem.out.tensor.numel():
        return [], outputs
    added = _rows(add)
    affine = (*_vectors(weight, bias), *_rows(scale), *_rows(shift), eps)

    width = _resident_channels(problem)
    if width:
        vector = problem.vector(width=width)
        block_p, block_c = triton.next_power_of_2(p), triton.next_power_of_2(width)
        share = width // vector if problem.channels_last else width
        y = _argument(problem.out, vector, problem.channels_last)
        return [
            Launch(
                _resident_kernel,
                (n, triton.cdiv(c, width), 1),
                (*_input_arguments(problem, vector), share, *added, *y, mean, rstd, *affine),
                dict(
                    BLOCK_P=block_p,
                    BLOCK_C=block_c,
                    VECTOR=vector,
                    CHANNELS_LAST=problem.channels_last,
                    SEAM=problem.seam(width),
                    GROUPS=triton.next_power_of_2(width // problem.per_group),
                    RUN=math.gcd(problem.per_group, block_c),
                    WHOLE=p == block_p and width == block_c and c % width == 0,
                    SILU=silu,
                ),
                _warps(block_p * block_c, 64),
            )
        ], outputs

    grid = _grid(problem)
    vector = problem.vector()
    shared = (*_input_arguments(problem, vector), grid.rows, *added, *_slots(problem, grid))
    y = _argument(problem.out, vector, problem.channels_last)
    constants = dict(
        grid.constants(), VECTOR=vector, CHANNELS_LAST=problem.channels_last, SEAM=problem.seam(grid.block_c)
    )
    return [
        Launch(_statistics_kernel, grid.programs, shared, constants, grid.num_warps),
        Launch(
            _apply_kernel,
            grid.programs,
            (*shared, *y, mean, rstd, *affine),
            dict(constants, SILU=silu),
            grid.num_warps,
        ),
    ], outputs


def plan_group_norm_backward(
    grad: Tensor,
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches of `group_norm_backward`, and the outputs that they fill. Needs no device and reads no data."""
    problem = _problem(h, skip, num_groups)
    n, c, _ = problem.shape
    dz_sum = h.new_zeros((n, c), dtype=torch.float32)
    dzu_sum = torch.zeros_like(dz_sum)
    outputs = (problem.out.tensor, dz_sum, dzu_sum)
    if not problem.out.tensor.numel():
        return [], outputs
    dy = _operand(grad, problem.out.tensor)
    grid = _grid(problem)
    vector = problem.vector(dy)
    partial = h.new_empty((2, n, grid.splits, c), dtype=torch.float32)
    shared = (
        *(*_input_arguments(problem, vector), grid.rows, *_rows(add), *_slots(problem, grid)),
        *(*_argument(dy, vector, problem.channels_last), *_vectors(mean, rstd)),
        *(*_vectors(weight, bias), *_rows(scale), *_rows(shift), partial[0], partial[1]),
    )
    dx = _argument(problem.out, vector, problem.channels_last)
    constants = dict(
        grid.constants(), VECTOR=vector, CHANNELS_LAST=problem.channels_last, SEAM=problem.seam(grid.block_c), SILU=silu
    )
    return [
        Launch(_sums_kernel, grid.programs, shared, constants, grid.num_warps),
        Launch(_gradient_kernel, grid.programs, (*shared, *dx, dz_sum, dzu_sum), constants, grid.num_warps),
    ], outputs


def _resident_channels(problem: _Problem) -> int:
    """The channels of a program of the single-kernel variant, whole groups; 0 where the two kernels serve.

    Channels innermost: as few as make whole sectors, so that no two programs read the same one. Positions innermost:
    one group, which is one piece of memory. The variant serves where this is at most RESIDENT_ELEMENTS. Of smaller
    ones a program takes as many as keep a warp busy.
    """
    _, c, p = problem.shape
    unit = min(c, math.lcm(problem.per_group, problem.sector)) if problem.channels_last else problem.per_group
    if triton.next_power_of_2(p) * triton.next_power_of_2(unit) > RESIDENT_ELEMENTS:
        return 0
    return min(c, unit * max(1, 1024 // (p * unit)))


def _grid(problem: _Problem) -> _Grid:
    """Divide [N, C, P] among at least PROGRAMS programs, as far as its size allows.

    Narrower tiles of channels make up for fewer splits than that takes, down to one sector of each position.
    """
    n, c, p = problem.shape
    per_group = problem.per_group
    if problem.channels_last:
        block_c = 4 * problem.sector
        while block_c > problem.sector and n * triton.cdiv(c, block_c) * _most_splits(p, per_group, block_c) < PROGRAMS:
            if p * block_c <= LEAST_ELEMENTS:
                break
            block_c //= 2
    else:
        block_c = max(1, min(64, 1024 // triton.next_power_of_2(p)), triton.next_power_of_2(c // 65535))
    block_c = min(block_c, triton.next_power_of_2(c))
    blocks = triton.cdiv(c, block_c)
    most = _most_splits(p, per_group, block_c)
    splits = min(most, max(triton.cdiv(PROGRAMS, n * blocks), triton.cdiv(p * block_c, MOST_ELEMENTS)))
    num_warps = _warps(triton.cdiv(p, splits) * block_c, 96)
    block_p = num_warps * 16 * problem.sector // block_c  # 16 bytes a thread
    if not problem.channels_last and block_c > 1:
        block_p = p  # several channels at a time only where one has too few positions
    block_p = triton.next_power_of_2(max(1, min(block_p, p)))
    tiles = max(1, p // (splits * block_p))
    if triton.cdiv(p, tiles * block_p) > most:
        tiles = triton.cdiv(p, splits * block_p)
    # Tiles in flight at a time; tiles that divide x need no masks.
    unroll = max(u for u in range(1, 7) if tiles % u == 0 and (p % block_p or p % (u * block_p) == 0))
    # Within a tile a group begins at a multiple of `run`: hence the most groups in a tile, the most tiles in a group.
    run = math.gcd(per_group, block_c)
    return _Grid(
        block_p=block_p,
        block_c=block_c,
        unroll=unroll,
        rows=tiles * block_p,
        programs=(n, blocks, triton.cdiv(p, tiles * block_p)),
        groups=triton.next_power_of_2(triton.cdiv(per_group - run + block_c, per_group)),
        parts=triton.next_power_of_2(triton.cdiv(block_c - run + per_group, block_c)),
        run=run,
        whole=p % (unroll * block_p) == 0 and c % block_c == 0,
        num_warps=num_warps,
    )


def _most_splits(p: int, per_group: int, block_c: int) -> int:
    """The splits up to which slots cost little beside x, which also bounds what a program keeps of them.

    A program of the second kernel reads those of its groups for all splits: all of them read splits² times the groups
    of a tile, or the tiles of a group. The constant keeps that to a few hundredths of x.
    """
    slots_per_split = max(per_group / block_c, block_c / per_group)
    return max(1, min(math.isqrt(int(p * block_c / (48 * slots_per_split))), p * block_c // LEAST_ELEMENTS))


def _warps(elements: int, per_thread: int) -> int:
    """Warps of a program, 1 to 8, for about `per_thread` elements a thread."""
    return min(8, max(1, triton.next_power_of_2(triton.cdiv(elements, 32 * per_thread))))


def _input_arguments(problem: _Problem, vector: int) -> tuple:
    """What every kernel takes first: x and the extents, those of the innermost dimension in vectors."""
    _, c, p = problem.shape
    first = problem.x[0].tensor.shape[1]
    if problem.channels_last:
        c, first = c // vector, first // vector
    else:
        p //= vector
    operands = [_argument(x, vector, problem.channels_last) for x in problem.x]
    h, skip = operands if len(operands) == 2 else (operands[0], (None, 0, 0, 0))
    return *h, *skip, first, c, p, problem.num_groups, problem.per_group


def _argument(x: _Operand, vector: int, channels_last: bool) -> tuple:
    """A tensor and its strides, those of all but the innermost dimension in vectors."""
    n, c, p = x.strides
    return (x.tensor, n // vector, c, p // vector) if channels_last else (x.tensor, n // vector, c // vector, p)


def _slots(problem: _Problem, grid: _Grid) -> tuple[Tensor, Tensor]:
    shape = (2, problem.shape[0], problem.num_groups, grid.parts, grid.slots)
    both = problem.out.tensor.new_empty(shape, dtype=torch.float32)
    return both[0], both[1]


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A parameter [N, C] and the stride of its rows, whose elements must be adjacent."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return x, x.stride(0)


def _vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _problem(h: Tensor, skip: Tensor | None, num_groups: int) -> _Problem:
    shape = (h.shape[0], h.shape[1] + (0 if skip is None else skip.shape[1]), *h.shape[2:])
    out = empty_in_order(h, shape) if _positions_adjoin(h) else h.new_empty(shape)
    x = [_operand(x, out) for x in (h, skip) if x is not None]
    return _Problem(tuple(x), _operand(out, out), num_groups)


def _operand(x: Tensor, like: Tensor) -> _Operand:
    """View x as [N, C, P], its positions in the order in which they lie in `like`; a copy where no one stride can."""
    order = sorted((d for d in range(2, x.ndim) if x.shape[d] > 1), key=like.stride, reverse=True)
    if any(x.stride(a) != x.stride(b) * x.shape[b] for a, b in itertools.pairwise(order)):
        x = empty_in_order(like, x.shape).copy_(x)
    n, c = (x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1))
    return _Operand(x, (n, c, x.stride(order[-1]) if order else 0))


def _positions_adjoin(x: Tensor) -> bool:
    """Whether the spatial dimensions follow one another in memory, as in NCHW and NHWC."""
    order = sorted((d for d in range(x.ndim) if x.shape[d] > 1 or d == 1), key=x.stride, reverse=True)
    return [spatial for spatial, _ in itertools.groupby(d > 1 for d in order)].count(True) < 2


def _in_order(y: Tensor, h: Tensor) -> Tensor:
    return y if _positions_adjoin(h) else to_order(y, h)
