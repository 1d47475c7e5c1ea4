"""Group norm through csrc/cpu/kernels/group_norm.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..group_norm import concatenated_shape
from ..layout import empty_in_order, to_order
from ..tiles import Operand, in_order, make_operand, make_output


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
    """Serve `cmfast.kernels.group_norm`; arguments and results are those of the reference.

    Tensors are read where they lie if the channels of all are adjacent in memory (NHWC), or the positions (NCHW).
    Others are copied first, into the order of the output.
    """
    y = make_output(h, concatenated_shape(h, skip))
    if not _alike([y]):  # the samples are innermost: of an expanded h, say
        result = group_norm(h.contiguous(), skip, num_groups, weight, bias, eps, add, scale, shift, silu)
        return to_order(result[0], h), *result[1:]
    mean = h.new_empty((h.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if y.tensor.numel():
        inputs = [make_operand(x, y.tensor) for x in (h, skip) if x is not None]
        if not _alike([*inputs, y]):
            inputs = [make_operand(empty_in_order(y.tensor, x.tensor.shape).copy_(x.tensor), y.tensor) for x in inputs]
        rows = [_row(row) for row in (weight, bias, add, scale, shift)]
        native.run(
            "group_norm",
            h.shape[0],
            h.shape[2:].numel(),
            num_groups,
            native.DTYPES[h.dtype],
            _planes(inputs[0]),
            _planes(inputs[1]) if skip is not None else None,
            _planes(y),
            [None if row is None else (row.data_ptr(), row.stride(0) if row.ndim > 1 else 0) for row in rows],
            eps,
            silu,
            mean.data_ptr(),
            rstd.data_ptr(),
        )
    return in_order(y.tensor, h), mean, rstd


def _alike(operands: Sequence[Operand]) -> bool:
    """Whether the channels of all are adjacent, or the positions of all."""
    planes = [_planes(x) for x in operands]
    return any(all(p[adjacent] == 1 for p in planes) for adjacent in (3, 4))


def _planes(x: Operand) -> tuple[int, int, int, int, int]:
    """Address, channels and the strides of [N, C, P]; a single channel or position is adjacent."""
    n, c, p = x.strides
    channels, positions = x.tensor.shape[1], x.tensor.shape[2:].numel()
    return x.tensor.data_ptr(), channels, n, c if channels > 1 else 1, p if positions > 1 else 1


def _row(row: Tensor | None) -> Tensor | None:
    """A float32 row [C] or rows [N, C] whose channels are adjacent in memory."""
    if row is None:
        return None
    row = row.float()
    return row if row.stride(-1) == 1 else row.contiguous()
