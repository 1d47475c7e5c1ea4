"""Nearest upsampling and 2 × 2 average pooling are done as a convolution reads its input."""

import torch
from torch import fx

from ..graph import CONV, Graph, arguments, change, shape

_aten = torch.ops.aten


def fuse(graph: Graph) -> int:
    """Let conv2d calls of larger kernels resample what they read."""
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        source, how = resampled(a["h"])
        plain = a["skip"] is None and a["resample"] is None and a["gain"] is None and not a["silu"]
        if how is None or not plain or shape(a["weight"])[2] == 1:
            continue
        old = a["h"]
        change(node, h=source, resample=how)
        graph.erase(old)
        count += 1
    return count


def resampled(x: fx.Node) -> tuple[fx.Node, str | None]:
    """What x is a resampling by 2 of, and how: "nearest", "average" or None."""
    if x.target is _aten.upsample_nearest2d.default:
        source = x.args[0]
        assert isinstance(source, fx.Node)
        if shape(x)[2:] == [2 * s for s in shape(source)[2:]]:
            return source, "nearest"
    if x.target is _aten.avg_pool2d.default:
        a = arguments(x)
        source = a["self"]
        even = all(s % 2 == 0 for s in shape(source)[2:])
        twos = list(a["kernel_size"]) == [2, 2] and list(a["stride"]) in ([], [2, 2]) and not any(a["padding"])
        if even and twos and a["divisor_override"] is None:
            return source, "average"
    return x, None
