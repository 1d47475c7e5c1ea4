"""Numbers that a convolution's output is multiplied by, or that are added to it, are in its weights and bias."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import fx

from ..graph import CONV, Graph, arguments, convolution_of, layer, only_user

_aten = torch.ops.aten


def fold(graph: Graph) -> int:
    """Let conv2d calls scale and shift their outputs, as decoders do that give images between -1 and 1."""
    count = 0
    for node in graph.calls(*_SCALE_AND_SHIFT):
        count += _fold(graph, node)
    return count


#: The largest factor, whose inverse is the smallest: in float16 the weights must not leave the range of full accuracy.
_LARGEST = 16

#: Of a call's arguments, by what its first one is multiplied, and what is then added.
_SCALE_AND_SHIFT: dict[Any, Callable[[dict[str, Any]], tuple[float, float]]] = {
    _aten.mul.Tensor: lambda a: (a["other"], 0.0),
    _aten.div.Tensor: lambda a: (1 / a["other"], 0.0),
    _aten.neg.default: lambda a: (-1.0, 0.0),
    _aten.add.Tensor: lambda a: (1.0, a["alpha"] * a["other"]),
    _aten.sub.Tensor: lambda a: (1.0, -a["alpha"] * a["other"]),
    _aten.rsub.Scalar: lambda a: (-a["alpha"], a["other"]),
}


def _fold(graph: Graph, node: fx.Node) -> bool:
    a = arguments(node)
    out, other = a["self"], a.get("other", 1.0)
    call = convolution_of(out)
    if call is None or not isinstance(other, Real) or not other:
        return False
    conv = arguments(call)
    weight, bias = graph.tensor(conv["weight"]), conv["bias"]
    if weight is None or only_user(out) is None or len(call.users) > 1 or conv["residual"] is not None or conv["relu"]:
        return False
    of_bias = weight.new_zeros(weight.shape[0]) if bias is None else graph.tensor(bias)
    scale, shift = map(float, _SCALE_AND_SHIFT[node.target](a))
    if of_bias is None or not 1 / _LARGEST <= abs(scale) <= _LARGEST or not math.isfinite(shift):
        return False
    of_weight = conv["weight"].target
    if scale != 1:
        conv["weight"] = graph.attribute(f"{of_weight} * {scale!r}", weight * scale, node)
    if bias is not None or shift:
        name = f"zeros for {of_weight}" if bias is None else bias.target
        conv["bias"] = graph.attribute(f"{name} * {scale!r} + {shift!r}", of_bias * scale + shift, node)
    folded = graph.call(node, CONV, **conv)
    folded.meta["layer"] = layer(call)
    graph.replace(node, graph.item(folded, 0))
    return True
