"""Zeros that the input of a convolution is padded with, on one side alone, say, are padding of the convolution."""

import torch
from torch import fx

from ..graph import CONV, Graph, arguments, change, shape

_PAD = torch.ops.aten.constant_pad_nd.default


def fuse(graph: Graph) -> int:
    """Let conv2d calls pad what they read."""
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        padded = a["h"]
        sides = _sides(padded) if a["skip"] is None and a["resample"] is None and a["gain"] is None else None
        if sides is None or a["silu"]:
            continue
        change(node, h=padded.args[0], padding=tuple(x + y for x, y in zip(a["padding"], sides, strict=True)))
        graph.erase(padded)
        count += 1
    return count


def _sides(x: fx.Node) -> list[int] | None:
    """The zeros before and after each spatial dimension; None of what is padded otherwise, or not at all."""
    if x.target is not _PAD:
        return None
    a = arguments(x)
    pairs = [*zip(a["pad"][::2], a["pad"][1::2], strict=True)]  # from the last dimension on
    pairs += [(0, 0)] * (len(shape(x)) - len(pairs))
    outer = pairs[-2:]  # of the channels and the samples
    if a["value"] != 0 or any(map(any, outer)) or any(side < 0 for pair in pairs for side in pair):
        return None
    return [side for pair in reversed(pairs[:-2]) for side in pair]
