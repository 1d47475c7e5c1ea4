"""Tiles of the convolution's kernels.

They follow from the shape of one sample alone: so its bits do not depend on the batch that it is in.
"""

import dataclasses
import math

import triton

from .launch import is_amd

#: Programs that a launch for one sample should have at least: an H100 has 132 multiprocessors.
PROGRAMS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is divided.

    Attributes:
        block_m: positions of a tile.
        block_n: channels of the output of a tile.
        block_k: channels of the input of a step.
        segment: steps of a part of the sum.
        segments: parts of the sum.
        num_warps: warps of a program.
        num_stages: depth of software pipelining over the steps.
    """

    block_m: int
    block_n: int
    block_k: int
    segment: int
    segments: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        parts = f"{self.segments} x {self.segment} steps, {self.num_warps} warps, {self.num_stages} stages"
        return f"{self.block_m} x {self.block_n} x {self.block_k}, {parts}"


def configuration(positions: int, columns: int, sources: list[int], taps: int, itemsize: int, arch: str) -> Config:
    """The tiles of a product.

    Args:
        positions: of the output, of one sample.
        columns: channels of the output.
        sources: channels of the input, or of each of a pair.
        taps: elements of the kernel.
        itemsize: bytes of an operand of products.
        arch: the architecture, "sm_90" or "gfx942" say; "" for any.
    """
    block_m = min(64, max(16, triton.next_power_of_2(positions)))
    block_n = min(64, max(16, triton.next_power_of_2(columns)))
    block_k = min(64 if itemsize == 2 else 32, max(16, triton.next_power_of_2(max(sources))))
    if block_k == 64 and any(c % 64 for c in sources) and all(c % 32 == 0 for c in sources):
        block_k = 32
    steps = _steps(sources, taps, block_k)
    rows = triton.cdiv(positions, block_m)
    # Narrower tiles come before parts of sums, which are written and read; the narrowest where 8 parts would not do.
    while block_n > 16 and rows * triton.cdiv(columns, block_n) * min(steps, 1 if block_n > 32 else 8) < PROGRAMS:
        block_n //= 2
    stages = 2 if is_amd(arch) else 3
    # On datacenter Blackwell a kernel of one tap, which applies gain and offset as it reads, spills with four warps.
    warps = 8 if arch.startswith("sm_10") and taps == 1 and block_m == 64 else 4
    return _divided(positions, columns, steps, Config(block_m, block_n, block_k, 0, 0, warps, stages))


#: Positions, output channels and input channels of a tile, warps and stages, for a measurement to choose from.
_TILES = (
    (64, 64, 64, 4, 4),
    (64, 64, 64, 8, 3),
    (64, 64, 32, 4, 4),
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (64, 32, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (32, 32, 64, 4, 4),
    (64, 16, 64, 4, 4),
)


def candidates(positions: int, columns: int, sources: list[int], taps: int, itemsize: int, arch: str) -> list[Config]:
    """The tiles that a measurement may choose from: those of `configuration`, whose arguments these are, and others.

    Of each there are two: its sum in parts, so that there are PROGRAMS programs, and as a whole.
    """
    rule = configuration(positions, columns, sources, taps, itemsize, arch)
    found = [rule]
    for block_m, block_n, block_k, warps, stages in _TILES:
        fits = block_m <= 4 * positions and block_n <= 4 * columns and block_k <= 4 * max(sources)
        if fits and (itemsize == 2 or block_k == 32):
            steps = _steps(sources, taps, block_k)
            whole = Config(block_m, block_n, block_k, steps, 1, warps, stages)
            found += [_divided(positions, columns, steps, whole), whole]
    return list(dict.fromkeys(found))


def _steps(sources: list[int], taps: int, block_k: int) -> int:
    return taps * sum(triton.cdiv(c, block_k) for c in sources)


def _divided(positions: int, columns: int, steps: int, tile: Config) -> Config:
    """A tile with its sum in as many parts as it takes to have PROGRAMS programs."""
    tiles = triton.cdiv(positions, tile.block_m) * triton.cdiv(columns, tile.block_n)
    segment = steps // min(steps, math.ceil(PROGRAMS / tiles))
    return dataclasses.replace(tile, segment=segment, segments=math.ceil(steps / segment))
