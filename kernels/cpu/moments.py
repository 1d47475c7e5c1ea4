"""Moments of channels, and group norm folded from them, through csrc/cpu/kernels/moments.cpp and fold.cpp."""

import torch
from torch import Tensor

from .. import native
from ..layout import empty_channels_last, with_adjacent_channels
from ..tiles import Operand, make_operand
from .operands import planes, row, row_address


def channel_moments(x: Tensor) -> Tensor:
    """Serve `cmfast.kernels.channel_moments`. A tensor whose channels are not adjacent in memory is copied first."""
    moments = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)
    if len(x):
        x = with_adjacent_channels(x)
        _launch_moments(moments, make_operand(x, empty_channels_last(x, x.shape)))
    return moments


def launch_moments(moments: Tensor, x: Tensor) -> None:
    """Write the moments [N, 2, C] of a tensor whose channels are adjacent."""
    _launch_moments(moments, make_operand(x, x))


def _launch_moments(moments: Tensor, x: Operand) -> None:
    n, positions = len(x.tensor), x.tensor.shape[2:].numel()
    native.run("moments", n, positions, native.DTYPES[x.tensor.dtype], planes(x), moments.data_ptr())


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
    """Serve `cmfast.kernels.fold_group_norm`; arguments and results are those of the reference."""
    first, second = first.contiguous(), None if second is None else second.contiguous()
    gain = first.new_empty((len(first), len(weight)))
    offset = torch.empty_like(gain)
    if len(first):
        affine, film = (row(weight), row(bias)), (row(add), row(scale), row(shift))
        launch_fold_group_norm(gain, offset, first, second, size, num_groups, *affine, eps, *film)
    return gain, offset


def launch_fold_group_norm(
    gain: Tensor,
    offset: Tensor,
    first: Tensor,
    second: Tensor | None,
    size: int,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Write gain and offset; all tensors are float32, their channels adjacent."""
    native.run(
        "fold_group_norm",
        len(first),
        size,
        num_groups,
        (first.data_ptr(), first.shape[2]),
        None if second is None else (second.data_ptr(), second.shape[2]),
        [row_address(x) for x in (weight, bias, add, scale, shift)],
        eps,
        gain.data_ptr(),
        offset.data_ptr(),
    )
