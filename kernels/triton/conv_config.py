"""Tiles of the convolution's kernels.

They follow from the shape of one sample alone: so its bits do not depend on the batch that it is in.
"""

import dataclasses
import math

import triton

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
    steps = taps * sum(triton.cdiv(c, block_k) for c in sources)
    rows = triton.cdiv(positions, block_m)
    # Narrower tiles come before parts of sums, which are written and read; the narrowest where 8 parts would not do.
    while block_n > 16 and rows * triton.cdiv(columns, block_n) * min(steps, 1 if block_n > 32 else 8) < PROGRAMS:
        block_n //= 2
    segments = min(steps, math.ceil(PROGRAMS / (rows * triton.cdiv(columns, block_n))))
    segment = steps // segments
    stages = 2 if arch.startswith("gfx") else 3
    return Config(block_m, block_n, block_k, segment, math.ceil(steps / segment), 4, stages)
