"""The input of a convolution, written once where its product would compute it again for every tap and tile.

u = x · gain + offset, or h · act(gate);  u = u · sigmoid(u);  u = average pooling by 2
"""

import triton
import triton.language as tl

from ..conv_arguments import GATES
from .attention_tiles import multiple, narrow

_GELU = tl.constexpr(GATES.index("gelu"))
_GELU_TANH = tl.constexpr(GATES.index("gelu_tanh"))


@triton.jit
def conv_input_kernel(
    h, h_n, h_z, h_y, h_x, skip, skip_n, skip_z, skip_y, skip_x, gain, gain_n, offset, offset_n, out,
    first, channels, out_height, out_width, positions, tiles_p, tiles_c,
    GATE: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, H_UNIT: tl.constexpr, SKIP_UNIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_P positions and BLOCK_C channels of a sample; ROWS says that pooling takes two rows, not one."""
    tile_c = tl.program_id(0) % tiles_c
    tile_p = tl.program_id(0) // tiles_c % tiles_p
    n = (tl.program_id(0) // tiles_c // tiles_p).to(tl.int64)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < positions)[:, None] & (c < channels)[None, :]
    z = p // (out_height * out_width)
    y = p // out_width % out_height
    x = p % out_width
    h += n * multiple(h_n, H_UNIT)
    if skip is not None:
        skip += n * multiple(skip_n, SKIP_UNIT)
    scale = tl.full((BLOCK_C,), 1.0, tl.float32)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    if AFFINE:
        scale = tl.load(gain + n * gain_n + c, mask=c < channels, other=0.0)
        shift = tl.load(offset + n * offset_n + c, mask=c < channels, other=0.0)

    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in tl.static_range((4 if ROWS else 2) if POOL else 1):
        iy = y * 2 + i // 2 if POOL and ROWS else y
        ix = x * 2 + i % 2 if POOL else x
        rows = z * multiple(h_z, H_UNIT) + iy * multiple(h_y, H_UNIT) + ix * multiple(h_x, H_UNIT)
        from_h = inside if GATE > 0 else inside & (c < first)[None, :]
        u = tl.load(h + rows[:, None] + c[None, :], mask=from_h, other=0.0).to(tl.float32)
        if skip is not None:
            rows = z * multiple(skip_z, SKIP_UNIT) + iy * multiple(skip_y, SKIP_UNIT) + ix * multiple(skip_x, SKIP_UNIT)
            if GATE > 0:
                u *= _gate(tl.load(skip + rows[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32), GATE)
            else:
                from_skip = inside & (c >= first)[None, :]
                u += tl.load(skip + rows[:, None] + (c - first)[None, :], mask=from_skip, other=0.0).to(tl.float32)
        if AFFINE:
            u = u * scale[None, :] + shift[None, :]
        if SILU:
            u = u / (1.0 + tl.exp(-u))
        total += u
    if POOL:
        total *= 0.25 if ROWS else 0.5
    pointers = out + n * positions * multiple(channels, UNIT) + (p * multiple(channels, UNIT))[:, None] + c[None, :]
    tl.store(pointers, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(g, GATE: tl.constexpr):
    """gelu(g), its approximation by tanh, or silu(g)."""
    if GATE == _GELU:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if GATE == _GELU_TANH:
        return g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    return g / (1.0 + tl.exp(-g))
