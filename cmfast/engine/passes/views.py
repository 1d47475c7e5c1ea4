"""Of several views of a value in a row one is left; dimensions of one element, and copies, are no matter."""

import torch
from torch import fx

from ..graph import PERMUTE, STRIDED, VIEW, Graph, operands, shape, value

_aten = torch.ops.aten
#: Operators whose result has the elements of their input in the same order.
_RESHAPES = (
    VIEW,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
)
_TRANSPOSES = (_aten.transpose.int, _aten.t.default)


def join(graph: Graph) -> int:
    """Let each view be taken of what is no view itself, without copies in between; none is left that changes nothing.

    A copy is only there for its strides, which nothing but operators of strides can see. Permutations are joined too;
    one that only moves dimensions of one element is a view.
    """
    count = 0
    if not any(True for _ in graph.calls(*STRIDED)):
        for node in graph.calls(_aten.clone.default):
            count += _leave_out(graph, node)
    for node in graph.calls(*_RESHAPES, *_TRANSPOSES, PERMUTE, _aten.expand.default):
        count += _join(graph, node)
    return count


def _join(graph: Graph, node: fx.Node) -> bool:
    source = operands(node)[0]
    if node.target is _aten.expand.default:
        return shape(source) == shape(node) and _leave_out(graph, node)
    if node.target in _RESHAPES:
        if node.target is VIEW and source.target is not VIEW and shape(source) != shape(node):
            return False
        return _view(graph, node, source)
    order = _order(node)
    while source.target is PERMUTE:
        before = _order(source)
        order, source = [before[d] for d in order], operands(source)[0]
    long = [d for d in order if shape(source)[d] != 1]
    if long == sorted(long):
        return _view(graph, node, source)
    if node.target is PERMUTE and source is node.args[0]:
        return False
    graph.replace(node, graph.like(node, PERMUTE, source, order))
    return True


def _view(graph: Graph, node: fx.Node, source: fx.Node) -> bool:
    """Let a node be a view of `source`, or of what that is a view of; no view at all where the shapes are the same."""
    if source.target is VIEW:
        source = operands(source)[0]
    graph.replace(node, source if shape(source) == shape(node) else graph.like(node, VIEW, source, shape(node)))
    return True


def _order(node: fx.Node) -> list[int]:
    """Which dimension of its input each of a permutation's dimensions is."""
    dims = list(range(len(shape(node))))
    if not dims:
        return []
    if node.target is PERMUTE:
        return [d % len(dims) for d in operands(node)[1]]
    a, b = operands(node)[1:] if node.target is _aten.transpose.int else (0, len(dims) - 1)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _leave_out(graph: Graph, node: fx.Node) -> bool:
    source = operands(node)[0]
    assert value(source).dtype == value(node).dtype
    graph.replace(node, source)
    return True
