"""The arguments of a convolution with prepared weights: one structure for its operator, backends and launcher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: What is done to the resolution, and the activation of a gate; in the order of the kernels' codes.
RESAMPLES = (None, "nearest", "average")
GATES = (None, "gelu", "gelu_tanh", "silu")


class ConvArguments(NamedTuple):
    """What torch.ops.cmfast.conv2d takes but for the backend, in the order of its schema: see `cmfast.kernels.conv2d`.

    x has one, two or three spatial dimensions, and stride and padding are given for each.
    """

    h: Tensor  # [N, C1, *spatial]
    skip: Tensor | None  # [N, C2, *spatial]; the gate [N, C1, *spatial] where there is one
    weight: Tensor  # [Cout, C1 + C2, *kernel], with a gate [Cout, C1, *kernel]; if packed, only the shape is read
    bias: Tensor | None
    packed: Tensor | None
    tile: int
    transformed: bool
    stride: Sequence[int]  # one a dimension
    padding: Sequence[int]  # two a dimension: before it and after it
    dtype: torch.dtype
    resample: str | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    silu: bool = False
    gate: str | None = None
    residual: Tensor | None = None
    residual_resample: str | None = None
    relu: bool = False
    moments: bool = False

    def output_shape(self) -> list[int]:
        """See `output_shape`."""
        return output_shape(self.h.shape, self.weight.shape, self.stride, self.padding, self.resample)


def output_shape(
    h: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], resample: str | None
) -> list[int]:
    """[N, Cout, *sizes] of an input and weights of these shapes; a size below 1 where the kernel does not fit in.

    So is that of an average of nothing, of a single row, also where padding makes room for the kernel.
    """
    sizes = resampled_sizes(h[2:], resample)
    outputs = output_sizes(sizes, weight[2:], stride, padding)
    if resample == "average":
        outputs = [output if size else 0 for output, size in zip(outputs, sizes, strict=True)]
    return [h[0], weight[0], *outputs]


def output_sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """The spatial sizes of a convolution's output, of an input of these sizes, once it is resampled."""
    padded = (size + before + after for size, before, after in zip(sizes, padding[::2], padding[1::2], strict=True))
    return [(size - k) // step + 1 for size, k, step in zip(padded, kernel, stride, strict=True)]


def resampled_sizes(sizes: Sequence[int], resample: str | None) -> list[int]:
    """The spatial sizes of an input once it is resampled: of a video, the first one stays as it is."""
    return [
        2 * s if factor == 2 and resample == "nearest" else s // factor if resample == "average" else s
        for s, factor in zip(sizes, resample_factors(len(sizes)), strict=True)
    ]


def resample_factors(dims: int) -> tuple[int, ...]:
    """By how much each of so many spatial dimensions is resampled: by 2, but not a video's first one."""
    return (1, 2, 2) if dims == 3 else (2,) * dims


def in_three(sizes: Sequence[int], missing: int = 1) -> tuple[int, int, int]:
    """Sizes of the depth, the height and the width; those of dimensions that are not there are `missing`."""
    depth, height, width = (*(missing,) * (3 - len(sizes)), *sizes)
    return depth, height, width
