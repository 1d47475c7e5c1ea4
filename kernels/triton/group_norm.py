"""Group normalisation on the GPU: `cmfast.kernels.group_norm`, whose file states the formula, and its gradient.

    u = x + add,  û = (u - mean_g) · rstd_g,  z = û · gain + offset,  y = z or z · sigmoid(z)
    gain = weight · (1 + scale),  offset = bias · (1 + scale) + shift              for each sample and channel

x [N, C, P], P the number of positions, is read where it lies: channels innermost (NHWC) or positions innermost (NCHW),
one tensor or a pair. Since all but x is constant over the positions of a channel, z is one multiply-add of x.

Forward, two kernels. A program of `statistics_kernel` takes BLOCK_C channels and a share (a split) of the positions,
and writes the mean and the sum of squared deviations of each group's part in them to a slot of its own.
`apply_kernel`, on the same grid, merges the slots of the groups it touches, always in the same order, and writes y.
Where all positions of whole groups fit into the registers of a program, `resident_kernel` does both and reads x once.

Backward, two kernels on such a grid: with dz = dy · activation'(z) and D channels a group,

    dx = rstd_g · (gain · dz - Σ_g gain·dz / (D·P) - û · Σ_g gain·dz·û / (D·P))

`sums_kernel` writes Σ dz and Σ dz·û of each split and channel, and what they add to the group's two sums;
`gradient_kernel` merges those and writes dx, and its programs of the first split the sums of each channel.

A tile is [BLOCK_P, BLOCK_C], 16 bytes of it to a thread, and UNROLL of them are in flight at a time. Channels
innermost, a tile takes 32 to 128 bytes of each position, whatever the size of a group, whose channels rarely start at a
multiple of 16 bytes; positions innermost, it takes one channel. No atomics: a slot has one writer, so results are
bit-identical from run to run.
"""

import math

import torch
import triton
from torch import Tensor

from ..tiles import in_order, make_operand, statistics_of_nothing
from .group_norm_forward import apply_kernel, resident_kernel, statistics_kernel
from .group_norm_gradients import gradient_kernel, sums_kernel
from .group_norm_grid import (
    Grid,
    Problem,
    argument,
    divide,
    input_arguments,
    make_problem,
    resident_channels,
    rows,
    vectors,
    warps_for,
)
from .launch import Launch, architecture, lanes


def group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [N, C, *spatial], and the mean and 1/√(variance + eps) of each group [N, num_groups]."""
    launches, (y, mean, rstd) = plan_group_norm(h, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
    for launch in launches:
        launch.run()
    return in_order(y, h), mean, rstd


def group_norm_backward(
    grad: Tensor,
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [N, C, *spatial], Σ dz and Σ dz·û [N, C]: z the value before the activation, û the normalised input."""
    launches, (dx, dz_sum, dzu_sum) = plan_group_norm_backward(
        grad, h, skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd
    )
    for launch in launches:
        launch.run()
    return in_order(dx, h), dz_sum, dzu_sum


def plan_group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    *,
    arch: str | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches of `group_norm`, and the outputs that they fill. Needs no device and reads no data.

    `arch` is the architecture to plan for, "sm_90" or "gfx942" say; None means that of the device of h.
    """
    threads = lanes(arch or architecture(h.device))
    problem = make_problem(h, skip, num_groups)
    n, c, p = problem.shape
    if not problem.out.tensor.numel():
        return [], (problem.out.tensor, *statistics_of_nothing(h, num_groups, eps))
    mean = h.new_empty((n, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    outputs = (problem.out.tensor, mean, rstd)
    added = rows(add)
    affine = (*vectors(weight, bias), *rows(scale), *rows(shift), eps)

    width = resident_channels(problem)
    if width:
        vector = problem.vector(width=width)
        block_p, block_c = triton.next_power_of_2(p), triton.next_power_of_2(width)
        share = width // vector if problem.channels_last else width
        y = argument(problem.out, vector, problem.channels_last)
        return [
            Launch(
                resident_kernel,
                (n, triton.cdiv(c, width), 1),
                (*input_arguments(problem, vector), share, *added, *y, mean, rstd, *affine),
                dict(
                    BLOCK_P=block_p,
                    BLOCK_C=block_c,
                    VECTOR=vector,
                    CHANNELS_LAST=problem.channels_last,
                    SEAM=problem.seam(width),
                    GROUPS=triton.next_power_of_2(width // problem.per_group),
                    RUN=math.gcd(problem.per_group, block_c),
                    WHOLE=p == block_p and width == block_c and c % width == 0,
                    SILU=silu,
                ),
                warps_for(block_p * block_c, 64, threads),
            )
        ], outputs

    grid = divide(problem, threads)
    vector = problem.vector()
    shared = (*input_arguments(problem, vector), grid.rows, *added, *_slots(problem, grid))
    y = argument(problem.out, vector, problem.channels_last)
    constants = dict(
        grid.constants(), VECTOR=vector, CHANNELS_LAST=problem.channels_last, SEAM=problem.seam(grid.block_c)
    )
    return [
        Launch(statistics_kernel, grid.programs, shared, constants, grid.num_warps),
        Launch(
            apply_kernel,
            grid.programs,
            (*shared, *y, mean, rstd, *affine),
            dict(constants, SILU=silu),
            grid.num_warps,
        ),
    ], outputs


def plan_group_norm_backward(
    grad: Tensor,
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
    *,
    arch: str | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches of `group_norm_backward`, and the outputs that they fill; see `plan_group_norm`."""
    problem = make_problem(h, skip, num_groups)
    n, c, _ = problem.shape
    dz_sum = h.new_zeros((n, c), dtype=torch.float32)
    dzu_sum = torch.zeros_like(dz_sum)
    outputs = (problem.out.tensor, dz_sum, dzu_sum)
    if not problem.out.tensor.numel():
        return [], outputs
    dy = make_operand(grad, problem.out.tensor)
    grid = divide(problem, lanes(arch or architecture(h.device)))
    vector = problem.vector(dy)
    partial = h.new_empty((2, n, grid.splits, c), dtype=torch.float32)
    shared = (
        *(*input_arguments(problem, vector), grid.rows, *rows(add), *_slots(problem, grid)),
        *(*argument(dy, vector, problem.channels_last), *vectors(mean, rstd)),
        *(*vectors(weight, bias), *rows(scale), *rows(shift), partial[0], partial[1]),
    )
    dx = argument(problem.out, vector, problem.channels_last)
    constants = dict(
        grid.constants(), VECTOR=vector, CHANNELS_LAST=problem.channels_last, SEAM=problem.seam(grid.block_c), SILU=silu
    )
    return [
        Launch(sums_kernel, grid.programs, shared, constants, grid.num_warps),
        Launch(gradient_kernel, grid.programs, (*shared, *dx, dz_sum, dzu_sum), constants, grid.num_warps),
    ], outputs


def _slots(problem: Problem, grid: Grid) -> tuple[Tensor, Tensor]:
    shape = (2, problem.shape[0], problem.num_groups, grid.parts, grid.slots)
    both = problem.out.tensor.new_empty(shape, dtype=torch.float32)
    return both[0], both[1]
