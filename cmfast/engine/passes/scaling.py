"""Numbers that a convolution's output is multiplied by, or that are added to it, are in its weights and bias.

They may be one a channel, as a batch norm has them.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import fx

from ..graph import CONV, Graph, arguments, convolution_of, dtype, layer, only_user, shape

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
_SCALE_AND_SHIFT: dict[Any, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    _aten.mul.Tensor: lambda a: (a["other"], 0.0),
    _aten.div.Tensor: lambda a: (1 / a["other"], 0.0),
    _aten.neg.default: lambda a: (-1.0, 0.0),
    _aten.add.Tensor: lambda a: (1.0, a["alpha"] * a["other"]),
    _aten.sub.Tensor: lambda a: (1.0, -a["alpha"] * a["other"]),
    _aten.rsub.Scalar: lambda a: (-a["alpha"], a["other"]),
}


def _fold(graph: Graph, node: fx.Node) -> bool:
    a = arguments(node)
    out, given = a["self"], a.get("other", 1.0)
    call, of_node = convolution_of(out), isinstance(given, fx.Node)
    other, name = (_of_channels(graph, given, node), str(given.target)) if of_node else (given, repr(given))
    if call is None or not isinstance(other, Real | torch.Tensor) or (isinstance(other, Real) and not other):
        return False
    if shape(out) != shape(node) or dtype(out) != dtype(node):  # one channel that becomes many, or a wider dtype
        return False
    conv = arguments(call)
    weight, bias = graph.tensor(conv["weight"]), conv["bias"]
    if weight is None or only_user(out) is None or len(call.users) > 1 or conv["residual"] is not None or conv["relu"]:
        return False
    of_bias = torch.zeros(weight.shape[0], device=graph.device) if bias is None else graph.tensor(bias)
    scale, shift = (
        torch.as_tensor(x, dtype=torch.float32) for x in _SCALE_AND_SHIFT[node.target](a | {"other": other})
    )
    if of_bias is None or not _fits(scale) or not shift.isfinite().all():
        return False
    of_weight, by = conv["weight"].target, f"{node.target}, {name}, {a.get('alpha', 1)!r}"
    if (scale != 1).any():
        # Of a weight that was given up, what was packed of it is known by its name.
        scaled = weight if weight.is_meta else weight * _beside(scale, weight)
        conv["weight"] = graph.attribute(f"{of_weight} by {by}", scaled, node)
    if bias is not None or shift.any():
        of = f"zeros for {of_weight}" if bias is None else bias.target
        conv["bias"] = graph.attribute(f"{of} by {by}", of_bias * scale + shift, node)
    folded = graph.call(node, CONV, **conv)
    folded.meta["layer"] = layer(call)
    graph.replace(node, graph.item(folded, 0))
    return True


def _of_channels(graph: Graph, other: fx.Node, node: fx.Node) -> torch.Tensor | None:
    """The numbers [C] that a call has for each channel of its result [N, C, *spatial]; None where it has others."""
    known, whole = graph.tensor(other), shape(node)
    if known is None or not known.is_floating_point() or len(whole) < 2 or known.numel() != whole[1]:
        return None
    across = [1] * (len(whole) - known.ndim) + list(known.shape)
    return known.flatten() if len(across) == len(whole) and across[1] == whole[1] else None


def _beside(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Factors, one or one of each output, with the dimensions of weights [Cout, ...]."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _fits(scale: torch.Tensor) -> bool:
    sizes = scale.abs()
    return bool(((sizes <= _LARGEST) & ((sizes >= 1 / _LARGEST) | (sizes == 0))).all())
