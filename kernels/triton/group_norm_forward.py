"""Group norm: its formula and how the kernels divide the work are in group_norm.py."""

import triton
import triton.language as tl

from .group_norm_tiles import (
    extents,
    groups_between,
    groups_of_runs,
    groups_to_runs,
    load_added,
    load_affine,
    load_input,
    load_row,
    locate_input,
    read_slots,
    rows_step,
    runs_to_channels,
    subtract,
    sum_channels,
    sum_positions,
    sum_runs,
    sum_slots,
    tile_mask,
    tile_pointers,
    write_slots,
)


@triton.jit
def activated(x, added, mean, gain, offset, NARROW: tl.constexpr, SILU: tl.constexpr):
    """The output in float32: z = (x + added - mean) · gain + offset and SiLU, z / (1 + 2^(-z · log2 e)).

    16-bit outputs (NARROW) leave room for the rounding of what the difference cancels: there z is one multiply-add of
    x. So is t = -z · log2 e, and z / (1 + 2^t) = t / (-log2 e - log2 e · 2^t).
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if not NARROW:
        z = (x + added[None, :] - mean[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        return z
    else:
        offset += (added - mean) * gain
        if SILU:
            t = x * (gain * -LOG2E)[None, :] + (offset * -LOG2E)[None, :]
            return t / (tl.exp2(t) * -LOG2E - LOG2E)
        else:
            return x * gain[None, :] + offset[None, :]


@triton.jit
def _output(x, added, mean, gain, offset, out, SILU: tl.constexpr):
    """The output in the dtype of `out`."""
    dtype = out.dtype.element_ty
    return activated(x, added, mean, gain, offset, dtype != tl.float32, SILU).to(dtype)


@triton.jit
def statistics_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_means, slot_deviations,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the mean and the squared deviations of each group's part in the program's share of x to its slot."""
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = None if WHOLE else c < end
    groups, here = groups_between(first, end, per_group, GROUPS)
    index = groups_of_runs(first, per_group, BLOCK_C // RUN, RUN)
    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = locate_input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip

    # Sums relative to a value of the run: with a mean far from 0 the squares would lose the variance. It comes from
    # the first tile, so that nothing is read twice.
    tiles = ()  # type: tuple
    for i in tl.static_range(UNROLL):
        mask = None if WHOLE else tile_mask(begin + i * BLOCK_P, positions, valid, BLOCK_P)
        tiles += (load_input(x, others, c, first_channels, mask, SEAM),)
        x += step
        if SEAM:
            others += other_step
    origin = sum_positions(tl.where((tl.arange(0, BLOCK_P) == 0)[:, None], tiles[0], 0.0), RUN) / RUN
    if add is not None:
        added = load_row(add, n, add_n, c, valid)
        origin += sum_channels(added, RUN) / RUN
        offset = (runs_to_channels(origin, RUN) - added)[None, :]
    else:
        offset = runs_to_channels(origin, RUN)[None, :]

    mask = None if WHOLE else tile_mask(begin, positions, valid, BLOCK_P)
    total = subtract(tiles[0], offset, mask)
    squares = total * total
    for i in tl.static_range(1, UNROLL):
        mask = None if WHOLE else tile_mask(begin + i * BLOCK_P, positions, valid, BLOCK_P)
        difference = subtract(tiles[i], offset, mask)
        total += difference
        squares += difference * difference
    stop = tl.minimum(begin + rows, positions)
    for start in range(begin + BLOCK_P * UNROLL, stop, BLOCK_P * UNROLL):
        for i in tl.static_range(UNROLL):
            later = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            difference = subtract(load_input(x, others, c, first_channels, later, SEAM), offset, later)
            total += difference
            squares += difference * difference
            x += step
            if SEAM:
                others += other_step

    count = (stop - begin).to(tl.float32) * RUN
    total = sum_positions(total, RUN)
    # What is no number, of sums that overflow, stays: 0 would be a plausible deviation.
    deviation = tl.maximum(
        sum_positions(squares, RUN) - total * (total / count), 0.0, propagate_nan=tl.PropagateNan.ALL
    )
    mean = origin + total / count

    # The runs of a group have means of their own: its squared deviations are theirs and those of their means (Chan,
    # Golub and LeVeque 1979).
    runs = (tl.minimum(groups * per_group + per_group, end) - tl.maximum(groups * per_group, first)) // RUN
    group_mean = sum_runs(mean, index, GROUPS) / tl.maximum(runs, 1)
    apart = mean - groups_to_runs(group_mean, index)
    deviation = sum_runs(deviation + count * apart * apart, index, GROUPS)
    write_slots(group_mean, deviation, slot_means, slot_deviations, n, groups, here, split, num_groups, per_group,
                 BLOCK_C, PARTS, SPLITS)  # fmt: skip


@triton.jit
def apply_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_means, slot_deviations,
    y, y_n, y_c, y_p, mean_out, rstd_out, weight, bias, scale, scale_n, shift, shift_n, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Merge the slots of each group and write y, and the group's mean and rstd."""
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = None if WHOLE else c < end
    groups, here = groups_between(first, end, per_group, GROUPS)
    index = groups_of_runs(first, per_group, BLOCK_C // RUN, RUN)

    # Merge relative to the group's first slot, for the same reason as in the sums.
    means, deviations, counts = read_slots(slot_means, slot_deviations, n, groups, here, num_groups, per_group,
                                            positions, rows, BLOCK_C, PARTS, SPLITS)  # fmt: skip
    size = tl.cast(per_group, tl.float32) * tl.cast(positions, tl.float32)
    origin = tl.load(slot_means + (n * num_groups + groups) * (PARTS * SPLITS), mask=here, other=0.0)
    mean = origin + sum_slots(counts * (means - origin[:, None, None])) / size
    apart = means - mean[:, None, None]
    rstd = tl.rsqrt(sum_slots(deviations + counts * apart * apart) / size + eps)
    if split == 0:
        starts_here = (groups * per_group // BLOCK_C == tl.program_id(1)) & here
        tl.store(mean_out + n * num_groups + groups, mean, mask=starts_here)
        tl.store(rstd_out + n * num_groups + groups, rstd, mask=starts_here)

    gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    gain *= runs_to_channels(groups_to_runs(rstd, index), RUN)
    mean = runs_to_channels(groups_to_runs(mean, index), RUN)
    added = load_added(add, n, add_n, c, valid)

    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = locate_input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    out = tile_pointers(y, y_n, y_c, y_p, n, c, p, VECTOR, CHANNELS_LAST)
    out_step = rows_step(y_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    for start in range(begin, tl.minimum(begin + rows, positions), BLOCK_P * UNROLL):
        # All loads first: none may pass a store, which could write what it reads.
        tiles = ()  # type: tuple
        for i in tl.static_range(UNROLL):
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tiles += (load_input(x, others, c, first_channels, mask, SEAM),)
            x += step
            if SEAM:
                others += other_step
        for i in tl.static_range(UNROLL):
            value = _output(tiles[i], added, mean, gain, offset, y, SILU)
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tl.store(out, value, mask=mask)
            out += out_step


@triton.jit
def resident_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, width,
    add, add_n, y, y_n, y_c, y_p, mean_out, rstd_out, weight, bias, scale, scale_n, shift, shift_n, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr,
    GROUPS: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Statistics and y of `width` channels, whole groups, all of whose positions the program holds."""
    n = tl.program_id(0).to(tl.int64)
    channels, first_channels, positions = extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    width = width * VECTOR if CHANNELS_LAST else width
    first = tl.program_id(1) * width
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + width, channels)
    valid = None if WHOLE else c < end
    groups, here = groups_between(first, end, per_group, GROUPS)
    index = groups_of_runs(first, per_group, BLOCK_C // RUN, RUN)
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    mask = None if WHOLE else tile_mask(0, positions, valid, BLOCK_P)
    x, _, others, _ = locate_input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    x = load_input(x, others, c, first_channels, mask, SEAM)

    # Two passes over the registers: the mean, then how x differs from it, which also tells what rounding left of it.
    if add is not None:
        x += load_row(add, n, add_n, c, valid)[None, :]
        if mask is not None:
            x = tl.where(mask, x, 0.0)
    size = tl.cast(per_group, tl.float32) * tl.cast(positions, tl.float32)
    mean = sum_runs(sum_positions(x, RUN), index, GROUPS) / size
    difference = subtract(x, runs_to_channels(groups_to_runs(mean, index), RUN)[None, :], mask)
    rest = sum_runs(sum_positions(difference, RUN), index, GROUPS) / size
    variance = sum_runs(sum_positions(difference * difference, RUN), index, GROUPS) / size - rest * rest
    rstd = tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    tl.store(mean_out + n * num_groups + groups, mean + rest, mask=here)
    tl.store(rstd_out + n * num_groups + groups, rstd, mask=here)

    gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    gain *= runs_to_channels(groups_to_runs(rstd, index), RUN)
    rest = runs_to_channels(groups_to_runs(rest, index), RUN)
    value = _output(difference, tl.zeros([BLOCK_C], tl.float32), rest, gain, offset, y, SILU)
    out = tile_pointers(y, y_n, y_c, y_p, n, c, p, VECTOR, CHANNELS_LAST)
    tl.store(out, value, mask=mask)
