"""Tensors [N, C, *spatial] as the kernels of group norm read them: [N, C, P], with one stride for the positions."""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import empty_in_order, is_channels_last_image, positions_adjoin, to_order


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor that is read or written in tiles, and its strides along samples, channels and positions."""

    tensor: Tensor
    strides: tuple[int, int, int]


def make_operand(x: Tensor, like: Tensor) -> Operand:
    """View x as [N, C, P], its positions in the order in which they lie in `like`; a copy where no one stride can.

    The positions of `like` follow one another in memory.
    """
    if x.is_contiguous() and like.is_contiguous():  # what the rest finds too, in a few microseconds more
        size = x.shape[2:].numel()
        return Operand(x, (x.stride(0) if x.shape[0] > 1 else 0, size if x.shape[1] > 1 else 0, int(size > 1)))
    if is_channels_last_image(x) and is_channels_last_image(like):
        n, c, size = x.shape[0], x.shape[1], x.shape[2:].numel()
        return Operand(x, (c * size if n > 1 else 0, int(c > 1), c if size > 1 else 0))
    order = sorted((d for d in range(2, x.ndim) if x.shape[d] > 1), key=like.stride, reverse=True)
    if not _evenly_spaced(x, order):
        x = empty_in_order(like, x.shape).copy_(x)
        assert _evenly_spaced(x, order)
    n, c = (x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1))
    return Operand(x, (n, c, x.stride(order[-1]) if order else 0))


def _evenly_spaced(x: Tensor, order: Sequence[int]) -> bool:
    """Whether one stride leads through the dimensions `order` of x, the last of which is the innermost."""
    return all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in itertools.pairwise(order))


def make_output(h: Tensor, shape: Sequence[int]) -> Operand:
    """A fresh tensor of `shape` in the order of h, or a contiguous one where that could not be viewed as [N, C, P]."""
    out = empty_in_order(h, shape) if positions_adjoin(h) else h.new_empty(tuple(shape))
    return make_operand(out, out)


def in_order(y: Tensor, h: Tensor) -> Tensor:
    """The tensor of `make_output` in the order of h."""
    return y if positions_adjoin(h) else to_order(y, h)


def adjacent_rows(x: Tensor) -> tuple[Tensor, int]:
    """A parameter [N, C] whose channels are adjacent, and the stride of its rows."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return x, x.stride(0)


def statistics_of_nothing(h: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + eps) [N, num_groups] of groups without elements."""
    mean = h.new_zeros((h.shape[0], num_groups), dtype=torch.float32)
    return mean, torch.full_like(mean, eps).rsqrt()
