"""Moments of channels, and group norm folded from them, through csrc/cpu/kernels/moments.cpp and fold.cpp."""

import torch
from torch import Tensor

from .. import native
from ..tiles import make_operand
from .operands import planes, row, row_address


def channel_moments(x: Tensor) -> Tensor:
    """Serve `cmfast.kernels.channel_moments`. A tensor whose channels are not adjacent in memory is copied first."""
    moments = x.new_empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32)
    if len(x):
        operand = make_operand(x, x)
        if planes(operand)[3] != 1:
            rows = x.flatten(2).mT.contiguous().mT
            operand = make_operand(rows, rows)
        positions = x.shape[2:].numel()
        native.run("moments", len(x), positions, native.DTYPES[x.dtype], planes(operand), moments.data_ptr())
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
    """Serve `cmfast.kernels.fold_group_norm`; arguments and results are those of the reference."""
    first, second = first.contiguous(), None if second is None else second.contiguous()
    gain = first.new_empty((len(first), len(weight)))
    offset = torch.empty_like(gain)
    if len(first):
        rows = [row(x) for x in (weight, bias, add, scale, shift)]
        native.run(
            "fold_group_norm",
            len(first),
            size,
            num_groups,
            (first.data_ptr(), first.shape[2]),
            None if second is None else (second.data_ptr(), second.shape[2]),
            [row_address(x) for x in rows],
            eps,
            gain.data_ptr(),
            offset.data_ptr(),
        )
    return gain, offset
