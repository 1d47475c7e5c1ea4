"""What changes nothing is left out: a division by 1, such as diffusers' output_scale_factor, a dropout that is off.

Sums of products become a product and a sum, so that each is recognised.
"""

from typing import Any

import torch
from torch import fx

from ..graph import Graph, arguments, shape, value

_aten = torch.ops.aten
#: operator: the number that changes nothing
_NEUTRAL: dict[Any, int] = {
    _aten.mul.Tensor: 1,
    _aten.div.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Scalar: 1,
    _aten.add.Tensor: 0,
    _aten.sub.Tensor: 0,
    _aten.pow.Tensor_Scalar: 1,
}
_COPIES = (
    *(_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.lift_fresh.default),
    _aten._to_copy.default,  # to a device or a dtype: a graph has one device
)


def recognise(graph: Graph) -> int:
    """Let the users of such a call take what it was given: nothing of a graph is written in place."""
    count = sum(_apart(graph, node) for node in graph.calls(_aten.addcmul.default))
    for node in graph.calls(*_NEUTRAL, *_COPIES):
        x = node.args[0]
        if not isinstance(x, fx.Node) or value(x).dtype != value(node).dtype or shape(x) != shape(node):
            continue
        if value(x).stride() != value(node).stride():  # which as_strided may ask for
            continue
        if node.target in _COPIES or _second(node) == _NEUTRAL.get(node.target):
            graph.replace(node, x)
            count += 1
    return count


def _apart(graph: Graph, node: fx.Node) -> bool:
    """addcmul(a, b, c) as a + b · c."""
    a = arguments(node)
    if a["value"] != 1:
        return False
    product = graph.call(node, _aten.mul.Tensor, a["tensor1"], a["tensor2"])
    graph.replace(node, graph.call(node, _aten.add.Tensor, product, a["self"]))
    return True


def _second(node: fx.Node) -> float | None:
    """The number that is the second operand; None where it is a tensor."""
    a = arguments(node)
    other = a.get("other", a.get("exponent"))
    return other if isinstance(other, int | float) else None
