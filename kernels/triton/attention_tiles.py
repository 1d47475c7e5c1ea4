"""What the attention kernels share: where a program works, and its loads, stores and products of tiles.

Triton takes the vectors of a load along the stride that is 1, so the same kernel reads 16-byte vectors from
[N, T, 3·H·D], along D, and from [N, 3·H·D, T], along T. Of an argument it knows only whether 16 divides it; UNIT is the
power of two, up to 16, that divides all strides but the 1 (and T, where that is the innermost), so that head sizes of
40 and 72 are read in vectors too.
"""

import triton
import triton.language as tl

# Triton's interpreter holds bfloat16 as integers, which it would multiply, and truncates float32 to it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def locate(rows, heads, BLOCK: tl.constexpr):
    """The program's head as row n·H + h, n and h, all 64-bit, and the BLOCK rows of its tile."""
    tiles = tl.cdiv(rows, BLOCK)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    return head, head // heads, head % heads, tile * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """x, a multiple of UNIT, written so that the compiler sees it."""
    return x // UNIT * UNIT


@triton.jit
def matrix(ptr, n, h, stride_n, stride_h, UNIT: tl.constexpr):
    """The matrix of head h of sample n."""
    return ptr + multiple(n * stride_n + h * stride_h, UNIT)


@triton.jit
def load_tile(
    ptr, i, j, stride_i, stride_j, rows, columns, WHOLE: tl.constexpr, I_INNERMOST: tl.constexpr, UNIT: tl.constexpr
):
    """The elements [i, j] of a matrix of rows x columns, 0 outside it; WHOLE says that all are inside.

    The tile is loaded as it lies in memory, and I_INNERMOST says that i is the fast index there: only so is a tile that
    two products read, one of them transposed, copied asynchronously to shared memory, free of bank conflicts.
    """
    if I_INNERMOST:
        rows = multiple(rows, UNIT)
        return tl.trans(load_tile(ptr, j, i, stride_j, stride_i, columns, rows, WHOLE, False, UNIT))
    pointers = ptr + i.to(tl.int64)[:, None] * multiple(stride_i, UNIT) + j.to(tl.int64)[None, :] * stride_j
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def load_rows(ptr, i, rows):
    """The elements i of a vector of `rows`, 0 outside it."""
    return tl.load(ptr + i, mask=i < rows, other=0.0)


@triton.jit
def store_tile(
    ptr,
    values,
    i,
    j,
    stride_i,
    stride_j,
    rows,
    columns,
    WHOLE: tl.constexpr,
    I_INNERMOST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write the elements [i, j] of a matrix of rows x columns that are inside it, in its dtype.

    Always through a transposition: without one, the AMD compiler stores a product in the layout in which the matrix
    instruction leaves it, 2 or 8 bytes at a time.
    """
    if I_INNERMOST:
        stride_j = multiple(stride_j, UNIT)
        rows = multiple(rows, UNIT)
    else:
        stride_i = multiple(stride_i, UNIT)
    pointers = ptr + i.to(tl.int64)[None, :] * stride_i + j.to(tl.int64)[:, None] * stride_j
    values = tl.trans(narrow(values, ptr.dtype.element_ty))
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=(i < rows)[None, :] & (j < columns)[:, None])


@triton.jit
def dot(a, b, c):
    """The product a b added to c, summed in float32; float32 operands are multiplied as such, not as tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
