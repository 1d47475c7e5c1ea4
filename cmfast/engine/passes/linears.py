"""Take all linear layers of one input as one: the projections of the embedding, one a residual block."""

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from .. import without_data
from ..graph import CONV, Graph, arguments, layer, shape
from ..layers import common


def merge(graph: Graph) -> int:
    """Concatenate the weights of conv2d calls on the same image of one position; their outputs become slices.

    They are alike in all but their weights.
    """
    siblings: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.calls(CONV):
        a = arguments(node)
        of_one = shape(a["weight"])[2:] == [1, 1] and shape(a["h"])[2:] == [1, 1]
        known = a["bias"] is None or graph.tensor(a["bias"]) is not None
        if of_one and known and a["residual"] is None:
            others = tuple(value for name, value in a.items() if name not in ("h", "weight", "bias"))
            siblings[_source(a["h"]), tuple(shape(a["h"])), others].append(node)
    count = 0
    for calls in siblings.values():
        if len(calls) > 1 and all(arguments(call)["skip"] is None for call in calls):
            _merge(graph, calls)
            count += len(calls)
    return count


def _source(x: fx.Node) -> fx.Node:
    """What the image of one position is a view of."""
    return x.args[0] if x.target is torch.ops.aten.view.default else x  # type: ignore[return-value]


def _merge(graph: Graph, calls: list[fx.Node]) -> None:
    first = calls[0]
    weights, biases = [], []
    for call in calls:
        a = arguments(call)
        weight, bias = graph.tensor(a["weight"]), graph.tensor(a["bias"])
        assert weight is not None
        weights.append(weight)
        biases.append(torch.zeros(len(weight), device=graph.device) if bias is None else bias)
    a = arguments(first)
    name = " and ".join(str(arguments(call)["weight"].target) for call in calls)
    weight_node = graph.attribute(name, without_data.concatenated(weights), first)
    bias_node = graph.attribute(f"biases of {name}", torch.cat(biases), first)
    call = graph.call(first, CONV, **(a | {"weight": weight_node, "bias": bias_node}))
    call.meta["layer"] = common([layer(of) for of in calls])
    merged, begin = graph.item(call, 0), 0
    for old, weight in zip(calls, weights, strict=True):
        out = graph.item(old, 0)
        part = graph.call(out, torch.ops.aten.slice.Tensor, merged, 1, begin, begin + len(weight))
        graph.replace(out, part)
        begin += len(weight)
