"""The moments of channels, and group norm folded from them, on the GPU.

Moments: x [N, C, P] is read where it lies, as group norm reads it. A program sums BLOCK_C channels over a share (a
split) of the positions, relative to the first of them, and writes mean and squared deviations to a slot. The last
program to arrive at a tile of channels, as a counter tells, merges the slots of all, always in the same order: one
launch, and results that are bit-identical from run to run. It sets the counter back to 0, as the next launch needs it.

Fold: a program takes whole groups of a sample, whose channels it holds in registers.
"""

import torch
import triton
from torch import Tensor

from ..layout import empty_image, positions_adjoin
from ..tiles import make_operand
from .group_norm_grid import Problem, argument, rows, vectors
from .launch import Launch, architecture, is_amd, lanes
from .moments_kernels import channel_moments_kernel, fold_group_norm_kernel
from .moments_tiles import PROGRAMS, divide

# Elements of x that a program takes at least, as far as a sample has them.
_LEAST_ELEMENTS = 1024
# Elements of the slots that are read at a time.
_SLOTS = 2048
# Channels (with the padding to powers of two) of a program of the fold.
_CHANNELS = 256


def channel_moments(x: Tensor) -> Tensor:
    """Return the means and sums of squared deviations [N, 2, C] of the channels of x."""
    launches, moments = plan_channel_moments(x)
    for launch in launches:
        launch.run()
    return moments


def fold_group_norm(
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return gain and offset [N, C], all before them float32."""
    launches, folded = plan_fold_group_norm(first, second, size, num_groups, weight, bias, eps, add, scale, shift)
    for launch in launches:
        launch.run()
    return folded


def plan_channel_moments(x: Tensor, *, arch: str | None = None) -> tuple[list[Launch], Tensor]:
    """The launches of `channel_moments`, and the output that they fill. Needs no device and reads no data.

    `arch` is the architecture to plan for, "sm_90" or "gfx942" say; None means that of the device of x.
    """
    moments = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)
    if not len(x):
        return [], moments
    operand = make_operand(x, x if positions_adjoin(x) else empty_image(x, x.shape))
    problem = Problem((operand,), operand, 1)
    n, c, p = problem.shape
    arch = arch or architecture(x.device)
    tiles = divide(problem, lanes(arch))
    vector = problem.vector()
    _, blocks, programs = tiles.programs
    # With more programs, or smaller ones, the last one would merge long.
    step = tiles.block_p * tiles.unroll
    least = triton.cdiv(_LEAST_ELEMENTS, tiles.block_c * step)
    share = max(least, blocks * programs // (4 * PROGRAMS)) * step
    splits = triton.cdiv(p, share)
    slots = counters = None
    if splits > 1:
        slots = moments.new_empty((n, splits, 2, c))
        counters = moments.new_zeros((n, blocks), dtype=torch.int32)
    last = problem.channels_last
    extents = (c // vector, p) if last else (c, p // vector)
    return [
        Launch(
            channel_moments_kernel,
            (n, blocks, splits),
            (*argument(operand, vector, last), *extents, share, moments, slots, counters),
            dict(
                BLOCK_P=tiles.block_p,
                BLOCK_C=tiles.block_c,
                BLOCK_S=min(triton.next_power_of_2(splits), max(1, _SLOTS // tiles.block_c)),
                UNROLL=tiles.unroll,
                VECTOR=vector,
                CHANNELS_LAST=last,
                WHOLE=tiles.whole(problem),
                AMD=is_amd(arch),
            ),
            tiles.num_warps,
        )
    ], moments


def plan_fold_group_norm(
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    arch: str | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches of `fold_group_norm`, and the outputs that they fill; see `plan_channel_moments`."""
    n, c = len(first), len(weight)
    gain = first.new_empty((n, c))
    offset = torch.empty_like(gain)
    if not n:
        return [], (gain, offset)
    width = triton.next_power_of_2(c // num_groups)
    groups = min(triton.next_power_of_2(num_groups), max(1, _CHANNELS // width))
    num_warps = min(8, max(1, groups * width // 256))
    moments = (*vectors(first, second), first.shape[2], c - first.shape[2])
    return [
        Launch(
            fold_group_norm_kernel,
            (n, triton.cdiv(num_groups, groups)),
            (
                *(*moments, size, num_groups, c // num_groups, *rows(add), *vectors(weight, bias)),
                *(*rows(scale), *rows(shift), eps, gain, offset),
            ),
            dict(GROUPS=groups, WIDTH=width),
            num_warps,
        )
    ], (gain, offset)
