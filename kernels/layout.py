"""Memory layouts: an operator's output lies in memory in the order of its input."""

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_in_order(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A dense uninitialised tensor of `shape` whose dimensions lie in memory in the order of those of `like`.

    So channels_last stays channels_last for any number of spatial dimensions, and views of a packed tensor give an
    output that folds back into the packed layout without a copy. Where `like` is contiguous so is the result, whatever
    the strides of the dimensions of one element say.
    """
    if like.is_contiguous():
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    dense = torch.empty([shape[d] for d in order], dtype=dtype or like.dtype, device=like.device)
    return dense.permute([order.index(d) for d in range(like.ndim)])


def to_order(result: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The fresh tensor `result` in the layout of `empty_in_order` and in `dtype`; copied only where it differs."""
    if result.is_contiguous() and like.is_contiguous() and result.dtype == (dtype or like.dtype):
        return result
    return empty_in_order(like, result.shape, dtype).copy_(result)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
