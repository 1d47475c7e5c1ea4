"""Group norm by given moments on the GPU: `cmfast.kernels.apply_group_norm`, in one launch.

A program takes a tile of positions and channels. It asks for its part of x first; while that is on its way, it folds
the groups of its channels from the moments of all their channels, which may lie in other tiles and in both of a pair.
What is left a value is a multiply-add and SiLU. With pooling, a tile is of the output, and each of the two or four
values that are averaged is a tile of x.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..apply_group_norm import output_shape
from ..conv_arguments import resample_factors
from ..layout import channels_adjoin, empty_image
from ..tiles import Operand, make_operand
from .group_norm_forward import activated
from .group_norm_grid import Problem, argument, input_arguments, rows, vectors
from .group_norm_tiles import (
    extents,
    groups_between,
    groups_of_runs,
    groups_to_runs,
    load_added,
    load_affine,
    load_input,
    locate_input,
    rows_step,
    runs_to_channels,
    tile_mask,
    tile_pointers,
)
from .launch import Launch, architecture, lanes
from .moments_tiles import divide, fold_groups


def apply_group_norm(
    h: Tensor,
    skip: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    resample: str | None,
) -> Tensor:
    """Return y [N, C, *spatial], normalised by the statistics that the moments give."""
    launches, y = plan_apply_group_norm(
        h, skip, first, second, num_groups, weight, bias, eps, add, scale, shift, silu, resample
    )
    for launch in launches:
        launch.run()
    return y


def plan_apply_group_norm(
    h: Tensor,
    skip: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    resample: str | None,
    *,
    arch: str | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of `apply_group_norm`, and the output that they fill. Needs no device and reads no data.

    `arch` is the architecture to plan for, "sm_90" or "gfx942" say; None means that of the device of h.
    """
    y = empty_image(h, output_shape(h, skip, resample))
    if not y.numel():
        return [], y
    operands = tuple(_operand(x, y) for x in (h, skip) if x is not None)
    problem = Problem(operands, make_operand(y, y), num_groups)
    factors = () if resample is None else resample_factors(h.ndim - 2)
    pool_y, pool_x = (1, 1, *factors)[-2:]
    tiles = divide(problem, lanes(arch or architecture(h.device)), pool_y * pool_x)
    last, per_group = problem.channels_last, problem.per_group
    # Positions innermost, what is pooled is not adjacent.
    vector = problem.vector() if last or resample is None else 1
    return [
        Launch(
            apply_moments_kernel,
            tiles.programs,
            (
                *input_arguments(problem, vector),
                *(math.prod(h.shape[2:]), *(1, 1, *h.shape[2:])[-2:], *(1, 1, *y.shape[2:])[-2:]),
                *vectors(first, second),
                *(*rows(add), *vectors(weight, bias), *rows(scale), *rows(shift), eps),
                *argument(problem.out, vector, last),
            ),
            dict(
                BLOCK_P=tiles.block_p,
                BLOCK_C=tiles.block_c,
                UNROLL=tiles.unroll,
                VECTOR=vector,
                CHANNELS_LAST=last,
                SEAM=problem.seam(tiles.block_c),
                GROUPS=tiles.groups(per_group),
                WIDTH=triton.next_power_of_2(per_group),
                RUN=math.gcd(per_group, tiles.block_c),
                WHOLE=tiles.whole(problem),
                SILU=silu,
                POOL_Y=pool_y,
                POOL_X=pool_x,
            ),
            tiles.num_warps,
        )
    ], y


def _operand(x: Tensor, y: Tensor) -> Operand:
    """View x as [N, C, P]; of a pair the second is copied where its channels lie otherwise than those of y."""
    return make_operand(x if channels_adjoin(x) == channels_adjoin(y) else empty_image(y, x.shape).copy_(x), y)


@triton.jit
def apply_moments_kernel(
    h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels, channels, positions, num_groups, per_group,
    size, in_height, in_width, height, width, first, second,
    add, add_n, weight, bias, scale, scale_n, shift, shift_n, eps, y, y_n, y_c, y_p,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SEAM: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr,
    WHOLE: tl.constexpr, SILU: tl.constexpr, POOL_Y: tl.constexpr, POOL_X: tl.constexpr,
):  # fmt: skip
    """Write UNROLL tiles of y."""
    n = tl.program_id(0).to(tl.int64)
    channels, first_channels, positions = extents(channels, first_channels, positions, VECTOR, CHANNELS_LAST)
    start = tl.program_id(1) * BLOCK_C
    c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = tl.minimum(start + BLOCK_C, channels)
    valid = None if WHOLE else c < end
    begin = tl.program_id(2) * (BLOCK_P * UNROLL)
    p = begin + tl.arange(0, BLOCK_P)
    source = p.to(tl.int64)
    if POOL_Y * POOL_X > 1:
        row = p // width
        column = p - row * width
        if POOL_Y > 1:  # rows of all images of a video, of which an odd height leaves out the last
            image = row // height
            row = image * in_height + (row - image * height) * POOL_Y
        source = row.to(tl.int64) * in_width + column * POOL_X
    x, step, others, other_step = locate_input(
        h, h_n, h_c, h_p, skip, skip_n, skip_c, skip_p, first_channels,
        n, start, c, source, 1, VECTOR, CHANNELS_LAST, SEAM,
    )  # fmt: skip

    tiles = ()  # type: tuple
    for i in tl.static_range(UNROLL):
        mask = None if WHOLE else tile_mask(begin + i * BLOCK_P, positions, valid, BLOCK_P)
        for j in tl.static_range(POOL_Y):
            for k in tl.static_range(POOL_X):
                ahead = i * BLOCK_P * POOL_X + j * in_width + k  # of images that are pooled there is one tile
                tiles += (load_input(x + step * ahead, others + other_step * ahead, c, first_channels, mask, SEAM),)

    groups, here = groups_between(start, end, per_group, GROUPS)
    mean, rstd = fold_groups(
        first, second, first_channels, channels - first_channels, size, add, add_n, eps, n, groups, here, per_group,
        WIDTH,
    )  # fmt: skip
    index = groups_of_runs(start, per_group, BLOCK_C // RUN, RUN)
    gain, offset = load_affine(weight, bias, scale, scale_n, shift, shift_n, n, c, valid)
    gain *= runs_to_channels(groups_to_runs(rstd, index), RUN)
    mean = runs_to_channels(groups_to_runs(mean, index), RUN)
    added = load_added(add, n, add_n, c, valid)

    out = tile_pointers(y, y_n, y_c, y_p, n, c, p.to(tl.int64), VECTOR, CHANNELS_LAST)
    out_step = rows_step(y_p, BLOCK_P, VECTOR, CHANNELS_LAST)
    TAPS: tl.constexpr = POOL_Y * POOL_X
    NARROW: tl.constexpr = y.dtype.element_ty != tl.float32
    for i in tl.static_range(UNROLL):
        value = activated(tiles[i * TAPS], added, mean, gain, offset, NARROW, SILU)
        for j in tl.static_range(1, TAPS):
            value += activated(tiles[i * TAPS + j], added, mean, gain, offset, NARROW, SILU)
        if TAPS > 1:
            value *= 1.0 / TAPS
        mask = None if WHOLE else tile_mask(begin + i * BLOCK_P, positions, valid, BLOCK_P)
        tl.store(out, value.to(y.dtype.element_ty), mask=mask)
        out += out_step
