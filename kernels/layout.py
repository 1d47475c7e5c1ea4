"""Memory layouts and dtypes: an operator's output lies in memory in the order of its input."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def empty_in_order(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A dense uninitialised tensor of `shape` whose dimensions lie in memory in the order of those of `like`.

    So channels_last stays channels_last for any number of spatial dimensions, and views of a packed tensor give an
    output that folds back into the packed layout without a copy. Where dimensions of size 1 leave a choice, and the
    contiguous order is one, it is that.
    """
    if like.is_contiguous():
        if shape == like.shape and not like.is_meta:  # faster, of small tensors
            return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if shape == like.shape and is_channels_last_image(like):
        return torch.empty_like(like, dtype=dtype, memory_format=torch.channels_last)
    order = _memory_order(like)
    dense = torch.empty([shape[d] for d in order], dtype=dtype or like.dtype, device=like.device)
    return dense.permute([order.index(d) for d in range(like.ndim)])


def concatenated_shape(h: Tensor, skip: Tensor | None) -> tuple[int, ...]:
    """The shape [N, C1 + C2, *spatial] that the pair stands for."""
    return h.shape if skip is None else (h.shape[0], h.shape[1] + skip.shape[1], *h.shape[2:])


def to_order(result: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The fresh tensor `result` in the layout of `empty_in_order` and in `dtype`; copied only where it differs.

    Nothing is written in place: the definitions are differentiated and mapped (torch.func) through this.
    """
    dtype = dtype or like.dtype
    if result.is_contiguous() and like.is_contiguous() and result.dtype == dtype:
        return result
    order = list(range(like.ndim)) if like.is_contiguous() else _memory_order(like)
    dense = result.permute(order).to(dtype, copy=True, memory_format=torch.contiguous_format)
    return dense.permute([order.index(d) for d in range(like.ndim)])


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of x, that of the largest stride first."""
    return sorted(range(x.ndim), key=x.stride, reverse=True)


def describe(t: Tensor | None) -> str:
    """Shape and dtype, for errors."""
    return "None" if t is None else f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def positions_adjoin(x: Tensor) -> bool:
    """Whether the spatial dimensions follow one another in memory, as in NCHW and NHWC."""
    if x.is_contiguous() or is_channels_last_image(x):
        return True
    order = sorted((d for d in range(x.ndim) if x.shape[d] > 1 or d == 1), key=x.stride, reverse=True)
    return [spatial for spatial, _ in itertools.groupby(d > 1 for d in order)].count(True) < 2


def is_channels_last_image(x: Tensor) -> bool:
    """Whether x is an image [N, C, H, W] that torch calls contiguous in channels_last: the answer takes it no time."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_meta


def channels_adjoin(x: Tensor) -> bool:
    """Whether the channels of an image [N, C, *spatial] are adjacent in memory: it is channels last."""
    return x.shape[1] == 1 or x.stride(1) == 1


def channels_last(x: Tensor) -> Tensor:
    """The image x [N, C, *spatial] with its channels innermost in memory; copied where they are not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def with_adjacent_channels(x: Tensor) -> Tensor:
    """The image x, or a copy of it whose channels are adjacent in memory."""
    if channels_adjoin(x):
        return x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else channels_last(x)  # faster, of small ones


def empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised image of `shape` [N, C, *spatial] with its channels innermost, of the dtype of `like`."""
    return like.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


def empty_image(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised image of `shape` in the order of the image `like`: channels last where its channels adjoin."""
    if shape == like.shape and is_channels_last_image(like):
        return torch.empty_like(like, memory_format=torch.channels_last)  # faster, of small tensors
    return empty_channels_last(like, shape) if channels_adjoin(like) else like.new_empty(tuple(shape))


def reach(image: Tensor) -> int:
    """The elements of memory from a sample's first to its last, of an image [N, C, *spatial] that has some."""
    return 1 + sum((size - 1) * step for size, step in zip(image.shape[1:], image.stride()[1:], strict=True))
