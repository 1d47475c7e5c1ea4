"""What is added to a convolution's output is added as that is written."""

import math

import torch
from torch import fx

from ..graph import CONV, VIEW, Graph, arguments, convolution_of, only_user, shape, value
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
    image = _image(out)
    call = convolution_of(image)
    assert call is not None
    a = arguments(call)
    how = None
    if image is out and math.prod(shape(a["weight"])[2:]) > 1:
        added, how = resampled(added)
    elif image is not out:
        added = graph.call(node, VIEW, added, shape(image))
    fused = graph.item(graph.call(node, CONV, **(a | {"residual": added, "residual_resample": how})), 0)
    graph.replace(node, fused if image is out else graph.call(node, VIEW, fused, shape(node)))
    return True


def _image(out: fx.Node) -> fx.Node:
    """The output of a linear layer before it was viewed as rows."""
    viewed = out.args[0] if out.target is VIEW else None
    return viewed if isinstance(viewed, fx.Node) and shape(viewed)[2:] == [1, 1] else out


def _addable(graph: Graph, out: fx.Node, added: fx.Node) -> bool:
    if not isinstance(out, fx.Node) or not isinstance(added, fx.Node) or value(out).dtype != value(added).dtype:
        return False
    image = _image(out)
    call = convolution_of(image)
    if call is None or len(call.users) > 1 or only_user(out) is None or only_user(image) is None:
        return False
    return shape(out) == shape(added) and arguments(call)["residual"] is None and graph.tensor(added) is None
