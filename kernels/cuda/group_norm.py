"""Group norm and its derivative through csrc/cuda/group_norm.cu and group_norm_backward.cu."""

import math

import torch
from torch import Tensor

from .. import native
from ..layout import concatenated_shape
from ..tiles import Operand, adjacent_rows, in_order, make_operand, make_output, statistics_of_nothing


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
    """Serve `cmfast.kernels.group_norm`; arguments and results are those of the reference."""
    y = make_output(h, concatenated_shape(h, skip))
    if not y.tensor.numel():
        return in_order(y.tensor, h), *statistics_of_nothing(h, num_groups, eps)
    mean = h.new_empty((h.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    launch_group_norm(y.tensor, mean, rstd, h, skip, num_groups, weight, bias, eps, add, scale, shift, silu)
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
    """Write y, whose positions follow one another in memory, and mean and rstd [N, num_groups]."""
    out = make_operand(y, y)
    inputs = [make_operand(x, y) for x in (h, skip) if x is not None]
    rows = _rows(weight, bias, add, scale, shift)
    problem = _problem(inputs, rows, num_groups, out, eps, silu)
    capability = native.capability(h)
    floats = native.cuda().group_norm_workspace(problem, _strided(out), capability)
    workspace = h.new_empty(floats, dtype=torch.float32)
    native.launch(
        "group_norm",
        h,
        problem,
        _strided(out),
        native.address(mean),
        native.address(rstd),
        native.address(workspace),
        floats,
        capability,
    )


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
    """Serve the gradients of group norm; arguments and results are those of the reference."""
    dx = make_output(h, concatenated_shape(h, skip))
    dz_sum = h.new_zeros(dx.tensor.shape[:2], dtype=torch.float32)
    dzu_sum = torch.zeros_like(dz_sum)
    if dx.tensor.numel():
        inputs = [make_operand(x, dx.tensor) for x in (h, skip) if x is not None]
        dy = make_operand(grad.to(h.dtype), dx.tensor)
        rows = _rows(weight, bias, add, scale, shift)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        problem = _problem(inputs, rows, num_groups, dx, 0.0, silu)
        floats = native.cuda().group_norm_backward_workspace(problem, _strided(dy), _strided(dx))
        workspace = h.new_empty(floats, dtype=torch.float32)
        native.launch(
            "group_norm_backward",
            h,
            problem,
            _strided(dy),
            _strided(dx),
            native.address(mean),
            native.address(rstd),
            native.address(dz_sum),
            native.address(dzu_sum),
            native.address(workspace),
            floats,
        )
    return in_order(dx.tensor, h), dz_sum, dzu_sum


def _problem(
    inputs: list[Operand],
    rows: list[tuple[Tensor, int] | None],
    num_groups: int,
    out: Operand,
    eps: float,
    silu: bool,
) -> tuple:
    """What the launchers call a problem. The caller holds the tensors until the launch."""
    h, skip = inputs[0], inputs[1] if len(inputs) == 2 else None
    n, c, *spatial = out.tensor.shape
    return (
        _strided(h),
        None if skip is None else _strided(skip),
        [None if row is None else (native.address(row[0]), native.DTYPES[row[0].dtype], row[1]) for row in rows],
        (n, math.prod(spatial), c, h.tensor.shape[1], num_groups),
        native.DTYPES[out.tensor.dtype],
        eps,
        silu,
    )


def _rows(
    weight: Tensor | None, bias: Tensor | None, add: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> list[tuple[Tensor, int] | None]:
    """The parameters, their channels adjacent, and their strides along the samples."""
    vectors = [None if x is None else (x.contiguous(), 0) for x in (weight, bias)]
    return vectors + [None if x is None else adjacent_rows(x) for x in (add, scale, shift)]


def _strided(x: Operand) -> tuple[int, int, int, int]:
    return native.address(x.tensor), *x.strides
