"""The sinusoids of timesteps on the GPU: `cmfast.kernels.timestep_embedding`, in one launch.

A program makes both halves of a row, or of a part of it. The angle is reduced to r, at most π/4 from the nearest
multiple of π/2: in float64, where that takes two multiplications, exact for angles up to 2²⁰, whether or not the
compiler fuses them with the subtractions. In float32 the reduction would need fused multiplications, and the product
t · f could be fused with them, so that it would not be rounded as torch rounds it. The library's sin and cos would keep
a stack frame for large angles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

#: Frequencies of a program: 4 for each of 32 lanes.
_TILE = 128

_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# π/2 in two parts, the first of 33 bits: its multiples up to 2²⁰ are exact.
_HALF_PI = tl.constexpr(float.fromhex("0x1.921fb544p+0"))
_HALF_PI_REST = tl.constexpr(float.fromhex("0x1.0b4611a626331p-34"))


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, sin_first: bool) -> Tensor:
    """Return y [N, 2·F]; arguments and result are those of the reference."""
    launches, y = plan_timestep_embedding(t, frequencies, scale, sin_first)
    for launch in launches:
        launch.run()
    return y


def plan_timestep_embedding(
    t: Tensor, frequencies: Tensor, scale: float, sin_first: bool, *, arch: str | None = None
) -> tuple[list[Launch], Tensor]:
    """The launches of `timestep_embedding`, and the output that they fill. Needs no device and reads no data.

    The plan is the same for every architecture `arch`.
    """
    n, count = len(t), len(frequencies)
    y = t.new_empty((n, 2 * count), dtype=torch.float32)
    if not y.numel():
        return [], y
    return [
        Launch(
            timestep_embedding_kernel,
            (n, triton.cdiv(count, _TILE)),
            (t, t.stride(0), frequencies, frequencies.stride(0), float(scale), y, count),
            {"SIN_FIRST": sin_first, "TILE": _TILE},
            num_warps=1,
        )
    ], y


@triton.jit
def sincos(angle):
    """Sine and cosine of float32 angles, to within two units of rounding."""
    wide = angle.to(tl.float64)
    nearest = tl.floor(wide * _TWO_OVER_PI + 0.5)
    r = ((wide - nearest * _HALF_PI) - nearest * _HALF_PI_REST).to(tl.float32)
    quadrant = (nearest - 4.0 * tl.floor(0.25 * nearest)).to(tl.int32)
    # Minimax polynomials on [-π/4, π/4], those of the Cephes library.
    g = r * r
    sin = r + r * (g * (-1.6666654611e-1 + g * (8.3321608736e-3 + g * -1.9515295891e-4)))
    cos = 1.0 + g * (-0.5 + g * (4.166664568298827e-2 + g * (-1.388731625493765e-3 + g * 2.443315711809948e-5)))
    swapped = (quadrant & 1) != 0
    sine = tl.where(swapped, cos, sin)
    cosine = tl.where(swapped, sin, cos)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def timestep_embedding_kernel(
    t, t_n, frequencies, frequencies_i, scale, y, count, SIN_FIRST: tl.constexpr, TILE: tl.constexpr
):
    """Write up to TILE sines and cosines of one timestep."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < count
    time = tl.load(t + n * t_n).to(tl.float32)
    frequency = tl.load(frequencies + i * frequencies_i, mask=mask, other=0.0).to(tl.float32)
    sine, cosine = sincos(scale * (time * frequency))
    first = y + n * (2 * count) + i
    tl.store(first, sine if SIN_FIRST else cosine, mask=mask)
    tl.store(first + count, cosine if SIN_FIRST else sine, mask=mask)
