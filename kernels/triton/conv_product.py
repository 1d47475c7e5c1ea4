"""The product of a convolution, and what is added to it; the formula is in kernels/conv.py, the launches in conv.py.

    out[m, n] = Σ u[m, tap, c] · weight[tap, c, n] + bias[n] + residual[m, n]

A program takes BLOCK_M positions of one sample and BLOCK_N channels of the output. It goes through the channels of the
input (of a pair first those of h, then those of skip), BLOCK_K of them at a time, and for these through the taps of the
kernel: an implicit matrix product, whose left operand is gathered from where the image lies. Upsampling by 2 halves the
coordinates there, and a concatenation is never made.

The sum is cut into segments of as many steps, each summed from 0 and added to the others in their order: it has the
same bits whether one program takes all segments, or each has a program of its own because one sample would not fill the
chip. Then they write their sums to memory, and the last to arrive adds them. The moments of the output's channels are
taken so as well: each program writes those of its positions, and the last one of a sample's channels merges them in
their order. Which program is the last is told by a counter, a ticket, which that program sets back to 0.
"""

import triton
import triton.language as tl

from .attention_tiles import INTERPRETED, multiple, narrow
from .moments_tiles import is_last, load_written, merge_slots

# How a residual is read.
NO_RESIDUAL = tl.constexpr(0)
PLAIN = tl.constexpr(1)
NEAREST = tl.constexpr(2)
AVERAGE = tl.constexpr(3)

#: Taps of a kernel that an integer has bits for.
_MOST_BITS = tl.constexpr(63)
#: Slots of moments that are merged at a time.
_SLOTS = tl.constexpr(16)


@triton.jit
def conv_product_kernel(
    h, h_n, h_z, h_y, h_x, skip, skip_n, skip_z, skip_y, skip_x, weight, bias, gain, gain_n, offset, offset_n,
    residual, residual_n, residual_z, residual_y, residual_x, out, out_n, out_z, out_y, out_x,
    moments, slots, partials, sum_tickets, moment_tickets,
    first, second, columns, depth, height, width, out_height, out_width, positions, tiles_m, tiles_n,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, INSIDE: tl.constexpr, UP: tl.constexpr,
    AFFINE: tl.constexpr, SILU: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    VIDEO: tl.constexpr, H_UNIT: tl.constexpr, SKIP_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """One tile of the output, or one segment of its sum.

    Three-tuples are of the depth, the height and the width. INSIDE says that no tap reads beyond the input, UP by how
    many bits coordinates are shifted, ROWS that a residual's rows are resampled as well as its columns, VIDEO that
    there is a depth, WHOLE whether the channels of h, of skip and of the output fill whole blocks.
    """
    column_tile = tl.program_id(0) % tiles_n
    row_tile = tl.program_id(0) // tiles_n
    n = (row_tile // tiles_m).to(tl.int64)
    tile = row_tile % tiles_m
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < positions
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    y = m // out_width
    x = m - y * out_width
    z = tl.zeros_like(y)
    if VIDEO:
        z = y // out_height
        y -= z * out_height

    channels = first + second
    h += n * multiple(h_n, H_UNIT)
    h_shape = (h_z, h_y, h_x, first, depth, height, width)
    skip_shape = (skip_z, skip_y, skip_x, second, depth, height, width)
    z_0, y_0, x_0 = z * STRIDE[0] - PADDING[0], y * STRIDE[1] - PADDING[1], x * STRIDE[2] - PADDING[2]
    bits = valid
    if not INSIDE and KERNEL[0] * KERNEL[1] * KERNEL[2] <= _MOST_BITS:
        bits = _taps(z_0, y_0, x_0, valid, depth, height, width, KERNEL, VIDEO)
    corner = (z_0, y_0, x_0, bits)
    if skip is not None:
        skip += n * multiple(skip_n, SKIP_UNIT)
    if AFFINE:
        gain += n * gain_n
        offset += n * offset_n

    segment = tl.program_id(1)
    total = _segment(
        segment, h, h_shape, skip, skip_shape, weight, gain, offset, channels, columns, corner, column,
        KERNEL, INSIDE, UP, AFFINE, SILU, SEGMENT, BLOCK_M, BLOCK_N, BLOCK_K, H_UNIT, SKIP_UNIT, OUT_UNIT, WHOLE,
        PRECISION,
    )  # fmt: skip
    last = True
    if SPLIT:
        tiles = tl.num_programs(0)
        element = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial = partials + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N) + element
        tl.store(partial + segment.to(tl.int64) * tiles * (BLOCK_M * BLOCK_N), total)
        last = is_last(sum_tickets + tl.program_id(0), SEGMENTS, AMD)
        if last:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in range(SEGMENTS):
                total += load_written(partial + tl.cast(i, tl.int64) * tiles * (BLOCK_M * BLOCK_N), None)
    else:
        for i in range(1, SEGMENTS):
            total += _segment(
                i, h, h_shape, skip, skip_shape, weight, gain, offset, channels, columns, corner, column,
                KERNEL, INSIDE, UP, AFFINE, SILU, SEGMENT, BLOCK_M, BLOCK_N, BLOCK_K, H_UNIT, SKIP_UNIT, OUT_UNIT,
                WHOLE, PRECISION,
            )  # fmt: skip
    if last:
        inside = valid[:, None] & (column < columns)[None, :]
        added = tl.zeros((BLOCK_N,), tl.float32)
        if bias is not None:
            added = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
            total += added[None, :]
        if RESIDUAL != NO_RESIDUAL:
            residual += n * multiple(residual_n, RESIDUAL_UNIT)
            strides = (residual_z, residual_y, residual_x)
            total += _residual(residual, strides, z, y, x, column, inside, RESIDUAL, ROWS, RESIDUAL_UNIT)
        if RELU:
            total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out += n * multiple(out_n, OUT_UNIT)
        rows = z * multiple(out_z, OUT_UNIT) + y * multiple(out_y, OUT_UNIT) + x * multiple(out_x, OUT_UNIT)
        values = tl.trans(narrow(total, out.dtype.element_ty))
        tl.store(out + rows[None, :] + column[:, None], values, mask=tl.trans(inside))
        if moments is not None:
            slot = slots + (n * tiles_m + tile) * 2 * columns
            # Less the bias, since a large one would leave the tiles' means few digits for their differences.
            _write_moments(
                slot, total - added[None, :], valid, tl.minimum(positions - tile * BLOCK_M, BLOCK_M), column, columns
            )
            if is_last(moment_tickets + n * tiles_n + column_tile, tiles_m, AMD):
                first_slots = slots + n * tiles_m * 2 * columns + column
                mean, deviation = merge_slots(
                    first_slots, columns, column < columns, tiles_m, BLOCK_M, positions, _SLOTS
                )
                to = moments + n * 2 * columns + column
                tl.store(to, mean + added, mask=column < columns)
                tl.store(to + columns, deviation, mask=column < columns)


@triton.jit
def _taps(z, y, x, valid, depth, height, width, KERNEL: tl.constexpr, VIDEO: tl.constexpr):
    """For each position, a bit for each tap of the kernel that says whether it reads within the input."""
    HEIGHT: tl.constexpr = KERNEL[1]
    WIDTH: tl.constexpr = KERNEL[2]
    ROWS: tl.constexpr = KERNEL[0] * HEIGHT
    of_row = tl.zeros_like(z).to(tl.int32 if ROWS * WIDTH <= 32 else tl.int64)
    for i in tl.static_range(WIDTH):
        of_row |= _within(x + i, width).to(of_row.dtype) << i
    taps = tl.zeros_like(of_row)
    for i in tl.static_range(ROWS):
        there = valid & _within(y + i % HEIGHT, height)
        if VIDEO:
            there = there & _within(z + i // HEIGHT, depth)
        taps |= tl.where(there, of_row << i * WIDTH, 0)
    return taps


@triton.jit
def _within(i, size):
    """Whether i is at least 0 and less than size."""
    return (i >= 0) & (i < size)


@triton.jit
def _segment(
    i, h, h_shape, skip, skip_shape, weight, gain, offset, channels, columns, corner, column,
    KERNEL: tl.constexpr, INSIDE: tl.constexpr, UP: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, H_UNIT: tl.constexpr,
    SKIP_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of segment i: steps i · SEGMENT and on, of h and then of skip."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    begin = i * SEGMENT
    first = h_shape[3]
    steps = TAPS * tl.cdiv(first, BLOCK_K)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    product = _add_products(
        product, begin, tl.minimum(begin + SEGMENT, steps), h, h_shape, weight, gain, offset, channels, columns, corner,
        column, KERNEL, INSIDE, UP, AFFINE, SILU, BLOCK_K, H_UNIT, OUT_UNIT, WHOLE[0], WHOLE[2], PRECISION,
    )  # fmt: skip
    if skip is not None:
        if AFFINE:
            gain += first
            offset += first
        weight += tl.cast(first, tl.int64) * multiple(columns, OUT_UNIT)
        end = tl.minimum(begin + SEGMENT - steps, TAPS * tl.cdiv(skip_shape[3], BLOCK_K))
        product = _add_products(
            product, tl.maximum(begin - steps, 0), end, skip, skip_shape, weight, gain, offset, channels, columns,
            corner, column, KERNEL, INSIDE, UP, AFFINE, SILU, BLOCK_K, SKIP_UNIT, OUT_UNIT, WHOLE[1], WHOLE[2],
            PRECISION,
        )  # fmt: skip
    return product


@triton.jit
def _add_products(
    product, begin, end, image, shape, weight, gain, offset, channels, columns, corner, column,
    KERNEL: tl.constexpr, INSIDE: tl.constexpr, UP: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr,
    BLOCK_K: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, C_WHOLE: tl.constexpr, N_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of the steps `begin` to `end` - 1 of an image: a tap and BLOCK_K channels each."""
    stride_z, stride_y, stride_x, size, depth, height, width = shape
    stride_z, stride_y, stride_x = multiple(stride_z, UNIT), multiple(stride_y, UNIT), multiple(stride_x, UNIT)
    z, y, x, taps = corner  # the positions themselves, where there are no bits of taps
    c = tl.arange(0, BLOCK_K)
    if UP == (0, 0, 0):
        image += (z * stride_z + y * stride_y + x * stride_x)[:, None] + c[None, :]
    weight += c.to(tl.int64)[:, None] * multiple(columns, OUT_UNIT) + column[None, :]
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    row_stride, image_stride = stride_y - KERNEL[2] * stride_x, stride_z - KERNEL[1] * stride_y
    for step in range(begin, end):
        tap = step % TAPS
        first = step // TAPS * BLOCK_K
        row = tap // KERNEL[2]
        tap_z = row // KERNEL[1] if KERNEL[0] > 1 else 0
        tap_y = row - tap_z * KERNEL[1]
        tap_x = tap - row * KERNEL[2]
        if INSIDE:
            inside = taps[:, None]
        elif TAPS <= _MOST_BITS:
            inside = (taps >> tap & 1)[:, None] != 0
        else:
            there = _within(z + tap_z, depth) & _within(y + tap_y, height) & _within(x + tap_x, width)
            inside = (taps & there)[:, None]
        if not C_WHOLE:
            inside = inside & (first + c < size)[None, :]
        if UP == (0, 0, 0):
            # The tap's z · stride_z + y · stride_y + x · stride_x, with as few operations as it takes.
            pointers = image + (tap * stride_x + row * row_stride + tap_z * image_stride + first)
        else:
            rows = (z + tap_z >> UP[0]) * stride_z + (y + tap_y >> UP[1]) * stride_y + (x + tap_x >> UP[2]) * stride_x
            pointers = image + rows[:, None] + (first + c)[None, :]
        u = tl.load(pointers, mask=inside, other=0.0)
        if AFFINE or SILU:
            v = u.to(tl.float32)
            if AFFINE:
                v = v * tl.load(gain + first + c, mask=first + c < size, other=0.0)[None, :]
                v += tl.load(offset + first + c, mask=first + c < size, other=0.0)[None, :]
            if SILU:
                v = v / (1.0 + tl.exp(-v))
            u = tl.where(inside, v, 0.0)
        pointers = weight + tl.cast(tap * channels + first, tl.int64) * multiple(columns, OUT_UNIT)
        if C_WHOLE and N_WHOLE:
            w = tl.load(pointers)
        else:
            w = tl.load(pointers, mask=(first + c < size)[:, None] & (column < columns)[None, :], other=0.0)
        u = _narrowed(u, w.dtype)
        if INTERPRETED:
            u, w = u.to(tl.float32), w.to(tl.float32)
        product = tl.dot(u, w, product, input_precision=PRECISION)
    return product


@triton.jit
def _narrowed(u, dtype: tl.constexpr):
    """The operand in the dtype of products, rounded to nearest."""
    if u.dtype == dtype:
        return u
    return narrow(u.to(tl.float32), dtype)


@triton.jit
def _residual(
    residual, strides, z, y, x, column, inside, HOW: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """The residual's values at output positions: as they are, nearest of half as many, or averages of twice as many."""
    stride_z, stride_y, stride_x = strides
    stride_z, stride_y, stride_x = multiple(stride_z, UNIT), multiple(stride_y, UNIT), multiple(stride_x, UNIT)
    if HOW == NEAREST:
        x = x >> 1
        if ROWS:
            y = y >> 1
    if HOW == AVERAGE:
        x = x * 2
        if ROWS:
            y = y * 2
    pointers = residual + (z * stride_z + y * stride_y + x * stride_x)[:, None] + column[None, :]
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if HOW == AVERAGE:
        value += tl.load(pointers + stride_x, mask=inside, other=0.0).to(tl.float32)
        if ROWS:
            value += tl.load(pointers + stride_y, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(pointers + stride_y + stride_x, mask=inside, other=0.0).to(tl.float32)
            value *= 0.5
        value *= 0.5
    return value


@triton.jit
def _write_moments(slot, values, valid, count, column, columns):
    """Write each column's mean over the valid rows, and the sum of squared deviations from it."""
    mean = tl.sum(tl.where(valid[:, None], values, 0.0), 0) / count
    deviation = tl.where(valid[:, None], values - mean[None, :], 0.0)
    tl.store(slot + column, mean, mask=column < columns)
    tl.store(slot + columns + column, tl.sum(deviation * deviation, 0), mask=column < columns)
