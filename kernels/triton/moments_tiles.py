"""How the kernels around moments divide a tensor among programs, and what several of them share.

Tiles are chosen by the shape of one sample: the results of a sample do not depend on its batch.
"""

import dataclasses
import math

import triton
import triton.language as tl

from .group_norm_grid import MOST, Problem, warps_for
from .group_norm_tiles import load_float

# Programs that one sample should give at least: one for each of an H100's multiprocessors.
PROGRAMS = 132
# Tiles that a program loads before it uses the first.
UNROLL = 4


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of BLOCK_P positions and BLOCK_C channels; a program has `unroll` of them in flight."""

    block_p: int
    block_c: int
    unroll: int
    programs: tuple[int, int, int]
    num_warps: int

    def whole(self, problem: Problem) -> bool:
        """Whether the tiles in flight divide x, which then needs no masks."""
        _, c, p = problem.shape
        return p % (self.block_p * self.unroll) == 0 and c % self.block_c == 0

    def groups(self, per_group: int) -> int:
        """The most groups that have channels in a tile, to a power of two."""
        run = math.gcd(per_group, self.block_c)
        return triton.next_power_of_2(triton.cdiv(per_group - run + self.block_c, per_group))


def divide(problem: Problem, lanes: int, taps: int = 1) -> Tiles:
    """Divide [C, P] into tiles of 16 bytes a thread, `taps` of them read for one that is written.

    Channels innermost, a tile takes 128 bytes of a position, or down to 32 where the programs would be too few; as few
    of them have fewer warps. Positions innermost, it takes one channel, or several of few positions.
    """
    n, c, p = problem.shape
    num_warps = min(4, warps_for(triton.cdiv(taps * c * p, PROGRAMS), 32, lanes))
    elements = num_warps * lanes * problem.sector // 2
    if problem.channels_last:
        block_c = 4 * problem.sector
        while block_c > problem.sector and triton.cdiv(c, block_c) * triton.cdiv(p * block_c, elements) < PROGRAMS:
            block_c //= 2
    else:
        block_c = max(1, min(64, 1024 // triton.next_power_of_2(p)), triton.next_power_of_2(triton.cdiv(c, MOST)))
    block_c = min(block_c, triton.next_power_of_2(c))
    block_p = triton.next_power_of_2(max(1, min(elements // block_c, p)))
    blocks = triton.cdiv(c, block_c)

    def fits(unroll: int) -> bool:
        enough = blocks * triton.cdiv(p, block_p * unroll) >= PROGRAMS
        return enough and (p % block_p != 0 or p % (block_p * unroll) == 0)

    unroll = next((u for u in (UNROLL // taps, UNROLL // taps // 2) if u > 1 and fits(u)), 1)
    while triton.cdiv(p, block_p * unroll) > MOST:
        unroll *= 2
    return Tiles(block_p, block_c, unroll, (n, blocks, triton.cdiv(p, block_p * unroll)), num_warps)


@triton.jit
def fold_groups(
    first, second, first_channels, second_channels, size, add, add_n, eps, n, groups, here, per_group,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1/√(variance + eps) of each group of x + add [GROUPS], from the moments of its channels.

    A group's squared deviations are those of its channels and of their means (Chan, Golub and LeVeque 1983). The mean
    is summed twice, the second time as what rounding left of it.
    """
    lane = tl.arange(0, WIDTH)
    c = (groups * per_group)[:, None] + lane[None, :]
    valid = here[:, None] & (lane < per_group)[None, :]
    in_first = valid & (c < first_channels)
    at = first + n * 2 * first_channels + c
    means = load_float(at, in_first)
    deviations = load_float(at + first_channels, in_first)
    if second is not None:
        in_second = valid & (c >= first_channels)
        at = second + n * 2 * second_channels + (c - first_channels)
        means = tl.where(in_first, means, load_float(at, in_second))
        deviations = tl.where(in_first, deviations, load_float(at + second_channels, in_second))
    if add is not None:
        means += load_float(add + n * add_n + c, valid)
    mean = tl.sum(means, 1) / per_group
    apart = tl.where(valid, means - mean[:, None], 0.0)
    rest = tl.sum(apart, 1) / per_group
    variance = tl.sum(deviations / tl.cast(size, tl.float32) + apart * apart, 1) / per_group - rest * rest
    return mean + rest, tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)


@triton.jit
def is_last(counter, programs, AMD: tl.constexpr):
    """Whether the other programs of as many have passed here; it then sees what they wrote, by `load_written`.

    The last one sets the counter back to 0.
    """
    if AMD:
        # Until a wave's stores are done: neither the barrier waits for them, nor what one wave of the program releases.
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0", "=v", [], tl.int32, False, 1)
    tl.debug_barrier()  # all threads of the program have written; then one of them says so
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def merge_slots(slots, channels, valid, splits, rows, positions, BLOCK_S: tl.constexpr):
    """The moments [C] of all splits, from the slots [S, 2, C] that they wrote, in their order.

    They are relative to the first one's mean (Chan, Golub and LeVeque 1983).
    """
    origin = load_written(slots, valid)
    shift = tl.zeros([slots.shape[0]], tl.float32)  # the mean less the first one's
    for start in range(0, splits, BLOCK_S):
        at, mask, count = _locate_slots(slots, channels, valid, start, splits, rows, positions, BLOCK_S)
        shift += tl.sum(tl.where(mask, count * (load_written(at, mask) - origin[None, :]), 0.0), 0)
    shift /= tl.cast(positions, tl.float32)
    total = tl.zeros([slots.shape[0]], tl.float32)
    for start in range(0, splits, BLOCK_S):
        at, mask, count = _locate_slots(slots, channels, valid, start, splits, rows, positions, BLOCK_S)
        apart = load_written(at, mask) - origin[None, :] - shift[None, :]
        total += tl.sum(tl.where(mask, load_written(at + channels, mask) + count * apart * apart, 0.0), 0)
    return origin + shift, total


@triton.jit
def _locate_slots(slots, channels, valid, start, splits, rows, positions, BLOCK_S: tl.constexpr):
    """Pointers to the means of BLOCK_S splits [S, C], which of them exist, and the positions that each stands for."""
    split = (start + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
    mask = split < splits
    if valid is not None:
        mask = mask & valid[None, :]
    count = tl.minimum(positions - split * rows, rows).to(tl.float32)
    return slots[None, :] + split * 2 * channels, mask, count


@triton.jit
def load_written(at, mask):
    """Load what other programs of this launch have written: from the cache that they share."""
    if mask is None:
        return tl.load(at, cache_modifier=".cg")
    else:
        return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
