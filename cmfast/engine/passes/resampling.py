"""Nearest upsampling and average pooling by 2 are done as a convolution reads its input."""

import math
from typing import Any

import torch
from torch import fx

from ...kernels.conv_arguments import resample_factors
from ..graph import CONV, VIEW, Graph, arguments, change, operands, shape

_aten = torch.ops.aten
_UPSAMPLINGS = (
    _aten.upsample_nearest1d.default,
    _aten.upsample_nearest2d.default,
    _aten.upsample_nearest3d.default,
)
_POOLINGS = (_aten.avg_pool2d.default, _aten.avg_pool3d.default)


def fuse(graph: Graph) -> int:
    """Let conv2d calls of larger kernels resample what they read."""
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        source, how = resampled(a["h"])
        plain = a["skip"] is None and a["resample"] is None and a["gain"] is None and not a["silu"]
        if how is None or not plain or math.prod(shape(a["weight"])[2:]) == 1:
            continue
        old = a["h"]
        change(node, h=source, resample=how)
        graph.erase(old)
        count += 1
    return count


def resampled(x: fx.Node) -> tuple[fx.Node, str | None]:
    """What x is a resampling by 2 of, and how: "nearest", "average" or None. The depth of a video must be the same."""
    factors = list(resample_factors(len(shape(x)) - 2))
    if x.target in _UPSAMPLINGS and _upsamples(arguments(x), factors):
        return operands(x)[0], "nearest"
    if x.target in _POOLINGS and _pools(arguments(x), factors):
        return operands(x)[0], "average"
    source = _pooled_rows(x) if x.target is VIEW and len(shape(x)) == 3 else None
    return (x, None) if source is None else (source, "average")


def _pooled_rows(x: fx.Node) -> fx.Node | None:
    """What x [N, C, L] is the average pooling of: torch pools it as images of one row."""
    pooled = operands(x)[0]
    if pooled.target is not _aten.avg_pool2d.default or not _pools(arguments(pooled), [1, 2]):
        return None
    rows = operands(pooled)[0]
    source: fx.Node = operands(rows)[0] if rows.target is VIEW else rows
    n, channels, length = shape(x)
    of_rows = shape(rows) == [n, channels, 1, 2 * length] and shape(source) == [n, channels, 2 * length]
    return source if of_rows else None


def _upsamples(a: dict[str, Any], factors: list[int]) -> bool:
    """Whether the sizes grow by just these factors, and positions are counted with them."""
    exact = [s * factor for s, factor in zip(shape(a["self"])[2:], factors, strict=True)]
    scales = [scale for name, scale in a.items() if name.startswith("scales")]
    return list(a["output_size"]) == exact and all(s in (None, f) for s, f in zip(scales, factors, strict=True))


def _pools(a: dict[str, Any], factors: list[int]) -> bool:
    """Whether the average is of blocks of just these sizes, and all positions are in one."""
    if len(shape(a["self"])) - 2 != len(factors):  # of a value without samples
        return False
    whole = all(s % factor == 0 for s, factor in zip(shape(a["self"])[2:], factors, strict=True))
    blocks = list(a["kernel_size"]) == factors and list(a["stride"]) in ([], factors) and not any(a["padding"])
    return whole and blocks and a["divisor_override"] is None
