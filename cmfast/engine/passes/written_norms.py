"""A group norm before a convolution of several taps is written once, normalised and activated: each tap only reads it.

In its prologue, a GPU's kernel would apply it again for every tap. Average pooling of what is convolved is done as well
as it is written; nearest upsampling stays in the convolution, which reads each value from where it is. A convolution of
one tap keeps the gain and the offset in its prologue: it reads each value once for a tile of its outputs.
"""

import math
import operator
from typing import Any

import torch
from torch import fx

from ..graph import CONV, Graph, arguments, change, layer, shape

_FOLD = torch.ops.cmfast.fold_group_norm.default
_APPLY = torch.ops.cmfast.apply_group_norm.default


def write(graph: Graph) -> int:
    """Let conv2d calls of several taps read what an apply_group_norm call writes, one for all with the same norm."""
    written: dict[Any, fx.Node] = {}
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        if a["gain"] is None or math.prod(shape(a["weight"])[2:]) == 1:
            continue
        gain, offset = a["gain"], a["offset"]
        fold = _producer(gain)
        if fold is None or fold.target is not _FOLD or _producer(offset) is not fold:
            continue
        resample = a["resample"] if a["resample"] == "average" else None
        key = (fold, a["h"], a["skip"], a["silu"], resample)
        if key not in written:
            written[key] = _applied(graph, node, fold, a, resample)
        left = None if resample else a["resample"]
        change(node, h=written[key], skip=None, gain=None, offset=None, silu=False, resample=left)
        graph.erase(gain)
        graph.erase(offset)
        count += 1
    return count


def _producer(item: fx.Node) -> fx.Node | None:
    """The call of several results that a node is one of."""
    return item.all_input_nodes[0] if item.target is operator.getitem else None


def _applied(graph: Graph, before: fx.Node, fold: fx.Node, a: dict[str, Any], resample: str | None) -> fx.Node:
    """The normalised and activated input of a convolution."""
    norm = arguments(fold)
    names = ("num_groups", "weight", "bias", "eps", "add", "scale", "shift")
    given = (norm["first"], norm["second"], *(norm[name] for name in names))
    applied = graph.call(before, _APPLY, a["h"], a["skip"], *given, a["silu"], resample, None)
    applied.meta["layer"] = layer(fold)
    return applied
