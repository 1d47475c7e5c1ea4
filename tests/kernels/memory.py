"""Where the tensors of a test lie in memory, and the NaN around them."""

import math

import torch
from torch import Tensor

GUARD = 4096  # elements of NaN around each input: more than a tile


def guarded(values: Tensor, layout: str = "c", guard: float = math.nan) -> Tensor:
    """The values in a layout ("c": [C, *spatial] order, "l": channels last), with NaN before and after in memory."""
    last = values.movedim(1, -1) if layout == "l" else values
    memory = torch.full((values.numel() + 2 * GUARD,), guard, dtype=values.dtype, device=values.device)
    view = memory[GUARD : GUARD + values.numel()].view(last.shape)
    view.copy_(last)
    return view.movedim(-1, 1) if layout == "l" else view


def memory_strides(x: Tensor) -> list[int]:
    """The strides that mean something: those of dimensions with more than one element."""
    return [x.stride(d) for d in range(x.ndim) if x.shape[d] > 1]
