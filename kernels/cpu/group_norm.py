"""Group norm through csrc/cpu/kernels/group_norm.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..group_norm import concatenated_shape
from ..layout import empty_in_order, to_order
from ..tiles import Operand, in_order, make_operand, make_output
from .operands import planes, row, row_address


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
        rows = [row(x) for x in (weight, bias, add, scale, shift)]
        _launch(y, mean, rstd, inputs, num_groups, rows, eps, silu)
    return in_order(y.tensor, h), mean, rstd


def launch_group_norm(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
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
) -> None:
    """Write y, mean and rstd. The channels of all images are adjacent, rows are float32."""
    inputs = [make_operand(x, y) for x in (h, skip) if x is not None]
    _launch(make_operand(y, y), mean, rstd, inputs, num_groups, (weight, bias, add, scale, shift), eps, silu)


def _launch(
    y: Operand,
    mean: Tensor,
    rstd: Tensor,
    inputs: Sequence[Operand],
    num_groups: int,
    rows: Sequence[Tensor | None],
    eps: float,
    silu: bool,
) -> None:
    native.run(
        "group_norm",
        y.tensor.shape[0],
        y.tensor.shape[2:].numel(),
        num_groups,
        native.DTYPES[y.tensor.dtype],
        planes(inputs[0]),
        planes(inputs[1]) if len(inputs) > 1 else None,
        planes(y),
        [row_address(x) for x in rows],
        eps,
        silu,
        mean.data_ptr(),
        rstd.data_ptr(),
    )


def _alike(operands: Sequence[Operand]) -> bool:
    """Whether the channels of all are adjacent, or the positions of all."""
    return any(all(planes(x)[adjacent] == 1 for x in operands) for adjacent in (3, 4))
