"""Group norm through csrc/cpu/kernels/group_norm.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..layout import empty_in_order, to_order

_Planes = tuple[int, int, int, int, int]


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

    Tensors are read where they lie if their channels are adjacent in memory (NHWC), or their positions (NCHW). Others,
    and pairs that do not lie alike, are copied first.
    """
    y = empty_in_order(h, (h.shape[0], h.shape[1] + (0 if skip is None else skip.shape[1]), *h.shape[2:]))
    mean = h.new_empty((h.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    planes = _alike([h, y] if skip is None else [h, y, skip])
    if planes is None:
        if skip is not None:
            h, skip = h.contiguous(), skip.contiguous()
        result = group_norm(h.contiguous(), skip, num_groups, weight, bias, eps, add, scale, shift, silu)
        return to_order(result[0], y), *result[1:]
    rows = [_row(row) for row in (weight, bias, add, scale, shift)]
    if y.numel():
        native.run(
            "group_norm",
            h.shape[0],
            h.shape[2:].numel(),
            num_groups,
            native.DTYPES[h.dtype],
            planes[0],
            planes[2] if skip is not None else None,
            planes[1],
            [None if row is None else (row.data_ptr(), row.stride(0) if row.ndim > 1 else 0) for row in rows],
            eps,
            silu,
            mean.data_ptr(),
            rstd.data_ptr(),
        )
    return y, mean, rstd


def _alike(tensors: Sequence[Tensor]) -> list[_Planes] | None:
    """The tensors as [N, C, P]: address, channels and strides. None where they do not lie alike, as NHWC or as NCHW."""
    planes = [_planes(t) for t in tensors]
    for adjacent in (3, 4):
        if all(p is not None and p[adjacent] == 1 for p in planes):
            return [p for p in planes if p is not None]
    return None


def _planes(t: Tensor) -> _Planes | None:
    """Address, channels and the strides of [N, C, P], P the spatial dimensions merged; None where they do not merge."""
    stride, size = 1, 1
    for d in range(t.ndim - 1, 1, -1):
        if t.shape[d] == 1:
            continue
        if size == 1:
            stride = t.stride(d)
        elif t.stride(d) != stride * size:
            return None
        size *= t.shape[d]
    channel_stride = t.stride(1) if t.shape[1] > 1 else 1
    return t.data_ptr(), t.shape[1], t.stride(0), channel_stride, stride


def _row(row: Tensor | None) -> Tensor | None:
    """A float32 row [C] or rows [N, C] whose channels are adjacent in memory."""
    if row is None:
        return None
    row = row.float()
    return row if row.stride(-1) == 1 else row.contiguous()
