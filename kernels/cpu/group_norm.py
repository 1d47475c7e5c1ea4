"""Group norm through csrc/cpu/kernels/group_norm.cpp, and its gradient through group_norm_backward.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..layout import concatenated_shape, empty_in_order, to_order
from ..tiles import Operand, in_order, make_operand, make_output, statistics_of_nothing
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
    if not alike([y]):  # the samples are innermost: of an expanded h, say
        result = group_norm(h.contiguous(), skip, num_groups, weight, bias, eps, add, scale, shift, silu)
        return to_order(result[0], h), *result[1:]
    if not y.tensor.numel():
        return in_order(y.tensor, h), *statistics_of_nothing(h, num_groups, eps)
    mean = h.new_empty((h.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    inputs = [as_output(x, y) for x in (h, skip) if x is not None]
    rows = [row(x) for x in (weight, bias, add, scale, shift)]
    _launch(y, mean, rstd, inputs, num_groups, rows, eps, silu)
    return in_order(y.tensor, h), mean, rstd


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
    """Serve `cmfast.kernels.group_norm_backward`; arguments and results are those of the reference.

    What is not read where it lies is copied first, as for `group_norm`.
    """
    shape = concatenated_shape(h, skip)
    dx = make_output(h, shape)
    if not alike([dx]):
        rest = (skip, num_groups, weight, bias, add, scale, shift, silu, mean, rstd)
        result = group_norm_backward(grad, h.contiguous(), *rest)
        return to_order(result[0], h), *result[1:]
    sums = h.new_zeros if not dx.tensor.numel() else h.new_empty
    dz_sum, dzu_sum = (sums(shape[:2], dtype=torch.float32) for _ in range(2))
    if dx.tensor.numel():
        inputs = [as_output(x, dx) for x in (grad.to(h.dtype), h, skip) if x is not None]
        rows = [row(x) for x in (weight, bias, add, scale, shift)]
        mean, rstd = mean.contiguous(), rstd.contiguous()
        native.run(
            "group_norm_backward",
            *sizes_of(dx, num_groups),
            planes(inputs[0]),
            planes(inputs[1]),
            planes(inputs[2]) if len(inputs) > 2 else None,
            planes(dx),
            [row_address(x) for x in rows],
            silu,
            mean.data_ptr(),
            rstd.data_ptr(),
            dz_sum.data_ptr(),
            dzu_sum.data_ptr(),
        )
    return in_order(dx.tensor, h), dz_sum, dzu_sum


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
        *sizes_of(y, num_groups),
        planes(inputs[0]),
        planes(inputs[1]) if len(inputs) > 1 else None,
        planes(y),
        [row_address(x) for x in rows],
        eps,
        silu,
        mean.data_ptr(),
        rstd.data_ptr(),
    )


def sizes_of(y: Operand, num_groups: int) -> tuple[int, int, int, int]:
    """Samples, positions, groups and the code of the dtype."""
    shape = y.tensor.shape
    return shape[0], shape[2:].numel(), num_groups, native.DTYPES[y.tensor.dtype]


def as_output(x: Tensor, y: Operand) -> Operand:
    """View x as the kernels read it beside the output y; a copy in the order of y where it lies otherwise."""
    found = make_operand(x, y.tensor)
    if alike([found, y]):
        return found
    return make_operand(empty_in_order(y.tensor, x.shape).copy_(x), y.tensor)


def alike(operands: Sequence[Operand]) -> bool:
    """Whether the channels of all are adjacent, or the positions of all."""
    if all([x.strides[1] == 1 or x.tensor.shape[1] < 2 for x in operands]):
        return True
    return all([x.strides[2] == 1 or x.tensor.shape[2:].numel() < 2 for x in operands])
