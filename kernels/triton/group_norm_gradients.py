"""The gradient of group norm: its formula and how the kernels divide the work are in group_norm.py."""

import triton
import triton.language as tl

from .group_norm_tiles import (
    extents,
    groups_between,
    groups_of_runs,
    groups_to_runs,
    load_added,
    load_affine,
    load_float,
    load_input,
    locate_input,
    read_slots,
    rows_step,
    runs_to_channels,
    sum_channels,
    sum_runs,
    sum_slots,
    tile_mask,
    tile_pointers,
    write_slots,
)


@triton.jit
def _silu_backward(dy, z):
    """The gradient dy · s · (1 + z · (1 - s)) with s = sigmoid(z), where 1 - s = e · s does not cancel."""
    e = tl.minimum(tl.exp(-z), 1e37)
    s = 1.0 / (1.0 + e)
    return dy * s * (1.0 + z * (e * s))


@triton.jit
def _down(value):
    """Sum [P, C] over the positions, in two stages: the order in which one would add does not matter so much."""
    FEW: tl.constexpr = value.shape[0] if value.shape[0] < 16 else 16
    return tl.sum(tl.sum(tl.reshape(value, [value.shape[0] // FEW, FEW, value.shape[1]]), 1), 0)


@triton.jit
def sums_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_dz, slot_dzu,
    grad, grad_n, grad_c, grad_p, mean, rstd, weight, bias, scale, scale_n, shift, shift_n, channel_dz, channel_dzu,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write Σ dz and Σ dz·û of each channel in the program's share of x, and each group's part of them to its slot."""
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = None if WHOLE else c < end
    groups, here = groups_between(first, end, per_group, GROUPS)
    index = groups_of_runs(first, per_group, BLOCK_C // RUN, RUN)
    gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    rstd = tl.load(rstd + n * num_groups + groups, mask=here, other=0.0)
    a = runs_to_channels(groups_to_runs(rstd, index), RUN)
    mean = tl.load(mean + n * num_groups + groups, mask=here, other=0.0)
    mean = runs_to_channels(groups_to_runs(mean, index), RUN)
    added = load_added(add, n, add_n, c, valid)

    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = locate_input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    dy = tile_pointers(grad, grad_n, grad_c, grad_p, n, c, p, VECTOR, CHANNELS_LAST)
    dy_step = rows_step(grad_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    dz_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dzu_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(begin, tl.minimum(begin + rows, positions), BLOCK_P * UNROLL):
        for i in tl.static_range(UNROLL):
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            u = load_input(x, others, c, first_channels, mask, SEAM) + added[None, :]
            u = (u - mean[None, :]) * a[None, :]
            dz = load_float(dy, mask)
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
    dz_sum = sum_runs(sum_channels(gain * dz_sum, RUN), index, GROUPS)
    dzu_sum = sum_runs(sum_channels(gain * dzu_sum, RUN), index, GROUPS)
    write_slots(dz_sum, dzu_sum, slot_dz, slot_dzu, n, groups, here, split, num_groups, per_group,
                 BLOCK_C, PARTS, SPLITS)  # fmt: skip


@triton.jit
def gradient_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group, rows,
    add, add_n, slot_dz, slot_dzu,
    grad, grad_n, grad_c, grad_p, mean, rstd, weight, bias, scale, scale_n, shift, shift_n, channel_dz, channel_dzu,
    dx, dx_n, dx_c, dx_p, dz_sum, dzu_sum,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Merge the slots of each group and write dx, and the first split's programs the sums of each channel."""
    n, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channels, first_channels, positions = extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    first = tl.program_id(1) * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(first + BLOCK_C, channels)
    valid = None if WHOLE else c < end
    groups, here = groups_between(first, end, per_group, GROUPS)
    index = groups_of_runs(first, per_group, BLOCK_C // RUN, RUN)
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

    dz_slots, dzu_slots, _ = read_slots(slot_dz, slot_dzu, n, groups, here, num_groups, per_group, positions, rows,
                                         BLOCK_C, PARTS, SPLITS)  # fmt: skip
    size = tl.cast(per_group, tl.float32) * tl.cast(positions, tl.float32)
    gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    rstd = tl.load(rstd + n * num_groups + groups, mask=here, other=0.0)
    a = runs_to_channels(groups_to_runs(rstd, index), RUN)
    mean = tl.load(mean + n * num_groups + groups, mask=here, other=0.0)
    mean = runs_to_channels(groups_to_runs(mean, index), RUN)
    added = load_added(add, n, add_n, c, valid)
    constant = -a * runs_to_channels(groups_to_runs(sum_slots(dz_slots) / size, index), RUN)
    slope = -a * runs_to_channels(groups_to_runs(sum_slots(dzu_slots) / size, index), RUN)

    begin = split.to(tl.int64) * rows
    p = begin + tl.arange(0, BLOCK_P)
    x, step, others, other_step = locate_input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, first, c, p, BLOCK_P, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip
    dy = tile_pointers(grad, grad_n, grad_c, grad_p, n, c, p, VECTOR, CHANNELS_LAST)
    dy_step = rows_step(grad_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    out = tile_pointers(dx, dx_n, dx_c, dx_p, n, c, p, VECTOR, CHANNELS_LAST)
    out_step = rows_step(dx_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    for start in range(begin, tl.minimum(begin + rows, positions), BLOCK_P * UNROLL):
        tiles = ()  # type: tuple
        for i in tl.static_range(UNROLL):
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tiles += (load_input(x, others, c, first_channels, mask, SEAM), load_float(dy, mask))
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
            mask = None if WHOLE else tile_mask(start + i * BLOCK_P, positions, valid, BLOCK_P)
            tl.store(out, du.to(dx.dtype.element_ty), mask=mask)
            out += out_step
