"""What is added to a convolution's output is added as that is written."""

import math

import torch
from torch import fx

from ..graph import CONV, PERMUTE, VIEW, Graph, arguments, convolution_of, layer, only_user, operands, shape, value
from .resampling import resampled


def fuse(graph: Graph) -> int:
    """Let conv2d calls add what follows them, resampled by 2 where that is what is added."""
    count = 0
    for node in graph.calls(torch.ops.aten.add.Tensor):
        a = arguments(node)
        if a["alpha"] == 1:
            count += _fuse(graph, node, [(a["other"], a["self"]), (a["self"], a["other"])])
    return count


def _fuse(graph: Graph, node: fx.Node, ways: list[tuple[fx.Node, fx.Node]]) -> bool:
    """The addition of an output and what is added to it; of two outputs, the later convolution takes the other's."""
    order = {n: i for i, n in enumerate(graph.nodes.nodes)}
    found = [way for way in ways if _addable(graph, *way)]
    if not found:
        return False
    out, added = max(found, key=lambda way: order[way[0]])
    image, chain = _views_of(out)
    call = convolution_of(image)
    assert call is not None
    a = arguments(call)
    how = None
    if not chain and math.prod(shape(a["weight"])[2:]) > 1:
        added, how = resampled(added)
    for view in chain:
        added = _undone(graph, node, view, added)
    sum_ = graph.call(node, CONV, **(a | {"residual": added, "residual_resample": how}))
    sum_.meta["layer"] = layer(call)
    fused = graph.item(sum_, 0)
    for view in reversed(chain):
        fused = graph.call(node, view.target, fused, operands(view)[1])
    graph.replace(node, fused)
    return True


def _views_of(out: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a value is a view of, and the views and permutations, the last first."""
    chain = []
    while out.target in (VIEW, PERMUTE):
        chain.append(out)
        out = operands(out)[0]
    return out, chain


def _undone(graph: Graph, before: fx.Node, view: fx.Node, x: fx.Node) -> fx.Node:
    """What x would be a view of, were it made by such a view."""
    if view.target is VIEW:
        return graph.call(before, VIEW, x, shape(operands(view)[0]))
    order = list(operands(view)[1])
    return graph.call(before, PERMUTE, x, [order.index(d) for d in range(len(order))])


def _addable(graph: Graph, out: fx.Node, added: fx.Node) -> bool:
    if not isinstance(out, fx.Node) or not isinstance(added, fx.Node) or value(out).dtype != value(added).dtype:
        return False
    image, chain = _views_of(out)
    call = convolution_of(image)
    if call is None or len(call.users) > 1 or any(only_user(x) is None for x in (image, *chain)):
        return False
    return (
        shape(out) == shape(added)
        and arguments(call)["residual"] is None
        and not arguments(call)["relu"]
        and graph.tensor(added) is None
    )
