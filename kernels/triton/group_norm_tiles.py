"""Pieces of the group norm kernels: tiles of x in memory, runs of channels, and slots of partial sums.

x is read as [N, C, P], P the number of positions, where it lies: channels innermost (NHWC) or positions innermost
(NCHW), one tensor or a pair.
"""

import triton
import triton.language as tl


@triton.jit
def tile_pointers(x, stride_n, stride_c, stride_p, n, c, p, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pointers [P, C] to the channels c and positions p of sample n.

    The strides of all but the innermost dimension come divided by VECTOR: the compiler knows of a runtime value only
    whether 16 divides it, and the product here tells it that each row starts at a whole vector. n, c and p are 64-bit.
    """
    C_UNIT: tl.constexpr = 1 if CHANNELS_LAST else VECTOR
    P_UNIT: tl.constexpr = VECTOR if CHANNELS_LAST else 1
    return x + n * stride_n * VECTOR + (c * stride_c * C_UNIT)[None, :] + (p * stride_p * P_UNIT)[:, None]


@triton.jit
def extents(channels, first_channels, positions, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The extents in elements: for the same reason those of the innermost dimension come in vectors."""
    if CHANNELS_LAST:
        return channels * VECTOR, first_channels * VECTOR, positions
    else:
        return channels, first_channels, positions * VECTOR


@triton.jit
def rows_step(stride_p, rows, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """What leads from a pointer to the one `rows` positions on."""
    UNIT: tl.constexpr = VECTOR if CHANNELS_LAST else 1
    return tl.cast(stride_p, tl.int64) * (rows * UNIT)


@triton.jit
def locate_input(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, n, first, c, p, rows,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr,
):  # fmt: skip
    """Where to read x at the channels c (`first` and on) and positions p: pointers and the step of `rows` positions.

    Of a pair (h, skip) a tile lies in one or the other, unless SEAM: then the second pointers and step are those of
    skip, and `load_input` takes each channel from its own.
    """
    x = tile_pointers(h, h_n, h_c, h_p, n, c, p, VECTOR, CHANNELS_LAST)
    step = rows_step(h_p, rows, VECTOR, CHANNELS_LAST)
    others, other_step = x, step
    if skip is not None:
        others = tile_pointers(skip, skip_n, skip_c, skip_p, n, c - first_channels, p, VECTOR, CHANNELS_LAST)
        other_step = rows_step(skip_p, rows, VECTOR, CHANNELS_LAST)
        if not SEAM:  # noqa: SIM102 - of the two conditions one is a constant
            if first >= first_channels:
                x, step = others, other_step
    return x, step, others, other_step


@triton.jit
def load_input(x, others, c, first_channels, mask, SEAM: tl.constexpr):
    """A tile of x in float32, by the pointers of `locate_input`; 0 where the mask has no element."""
    if SEAM:
        in_h = (c < first_channels)[None, :]
        if mask is None:
            mask = tl.full([1, 1], True, tl.int1)
        return tl.where(in_h, load_float(x, mask & in_h), load_float(others, mask & (c >= first_channels)[None, :]))
    else:
        return load_float(x, mask)


@triton.jit
def subtract(x, offset, mask):
    """The difference x - offset, 0 where the mask has no element."""
    if mask is None:
        return x - offset
    else:
        return tl.where(mask, x - offset, 0.0)


@triton.jit
def tile_mask(start, positions, valid, BLOCK_P: tl.constexpr):
    """Which elements of the tile at `start` exist, of channels that do (`valid`).

    Where the tiles divide x (WHOLE), callers take None in its place, which costs nothing; a function of Triton's could
    not return that before version 3.7.
    """
    return (start + tl.arange(0, BLOCK_P) < positions)[:, None] & valid[None, :]


@triton.jit
def load_float(x, mask):
    """Load in float32; 0 where the mask (None: everything) has no element."""
    if mask is None:
        return tl.load(x).to(tl.float32)
    else:
        return tl.load(x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_row(x, n, stride_n, c, valid):
    """Row n of a parameter [N, C] at the channels c, in float32."""
    return load_float(x + n * stride_n + c, valid)


@triton.jit
def load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid):
    """The gain and the offset of the channels c of sample n, before the normalisation is folded into the gain."""
    gain = tl.full([c.shape[0]], 1.0, tl.float32)
    offset = tl.zeros([c.shape[0]], tl.float32)
    if weight is not None:
        gain = load_row(weight, 0, 0, c, valid)
    if bias is not None:
        offset = load_row(bias, 0, 0, c, valid)
    if scale is not None:
        film = 1.0 + load_row(scale, n, scale_n, c, valid)
        gain, offset = gain * film, offset * film
    if shift is not None:
        offset += load_row(shift, n, shift_n, c, valid)
    return gain, offset


@triton.jit
def groups_between(first, end, per_group, GROUPS: tl.constexpr):
    """The groups that have channels in [first, end): their indices [GROUPS], and which of these are meant."""
    groups = first // per_group + tl.arange(0, GROUPS)
    return groups, groups * per_group < end


@triton.jit
def groups_of_runs(first, per_group, RUNS: tl.constexpr, RUN: tl.constexpr):
    """The group of each run of RUN channels, `first` and on, counted from the first channel's: [RUNS].

    RUN divides the channels of a group and of a tile. So a run lies in one group, and what is summed over groups, or
    the same in all of one, is kept once a run.
    """
    c = first % per_group + tl.arange(0, RUNS) * RUN
    return ((c + 0.5) / per_group).to(tl.int32)  # exact, and a fraction of what dividing integers costs


@triton.jit
def sum_positions(value, RUN: tl.constexpr):
    """Sum [P, C] to a value of each run: first over the run, which one thread holds."""
    return tl.sum(tl.sum(tl.reshape(value, [value.shape[0], value.shape[1] // RUN, RUN]), 2), 0)


@triton.jit
def sum_channels(value, RUN: tl.constexpr):
    """Sum [C] to a value of each run."""
    return tl.sum(tl.reshape(value, [value.shape[0] // RUN, RUN]), 1)


@triton.jit
def runs_to_channels(value, RUN: tl.constexpr):
    """Give each channel the value of its run."""
    return tl.reshape(tl.broadcast_to(value[:, None], [value.shape[0], RUN]), [value.shape[0] * RUN])


@triton.jit
def sum_runs(value, index, GROUPS: tl.constexpr):
    """Sum a value of each run over each group [GROUPS]."""
    return tl.sum(tl.where(index[None, :] == tl.arange(0, GROUPS)[:, None], value[None, :], 0.0), 1)


@triton.jit
def groups_to_runs(value, index):
    """Give each run the value of its group [GROUPS]; runs past the last channel get any."""
    return tl.gather(value, tl.minimum(index, value.shape[0] - 1), 0)


@triton.jit
def load_added(add, n, add_n, c, valid):
    """The row of `add`, or zeros."""
    if add is not None:
        return load_row(add, n, add_n, c, valid)
    else:
        return tl.zeros([c.shape[0]], tl.float32)


@triton.jit
def write_slots(first, second, firsts, seconds, n, groups, here, split, num_groups, per_group,
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
def read_slots(firsts, seconds, n, groups, here, num_groups, per_group, positions, rows,
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
def sum_slots(value):
    """Sum [GROUPS, PARTS, SPLITS] to a value of each group."""
    return tl.sum(tl.sum(value, 2), 1)
