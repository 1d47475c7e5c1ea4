"""Tensors as the launchers of the CPU kernels take them."""

from torch import Tensor

from ..tiles import Operand


def planes(x: Operand) -> tuple[int, int, int, int, int]:
    """Address, channels and the strides of [N, C, P]; a single channel or position is adjacent."""
    n, c, p = x.strides
    channels, positions = x.tensor.shape[1], x.tensor.shape[2:].numel()
    return x.tensor.data_ptr(), channels, n, c if channels > 1 else 1, p if positions > 1 else 1


def row(x: Tensor | None) -> Tensor | None:
    """A float32 row [C] or rows [N, C] whose channels are adjacent in memory; none stays none."""
    if x is None:
        return None
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def row_address(x: Tensor | None) -> tuple[int, int] | None:
    """Address of what `row` made, and the stride of its rows: 0 of one that serves every sample."""
    return None if x is None else (x.data_ptr(), x.stride(0) if x.ndim > 1 else 0)
