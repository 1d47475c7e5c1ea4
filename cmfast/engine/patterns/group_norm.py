"""torch's group norm, with addition before and FiLM and SiLU after it, becomes `cmfast.kernels.group_norm`."""

import operator
from typing import Any

import torch
from torch import fx

from ..graph import VIEW, Graph, arguments, only_user, shape, value

_aten = torch.ops.aten
_NORM = torch.ops.cmfast.group_norm.default


def recognise(graph: Graph) -> int:
    """Replace each group norm of which only the normalised values are read, with what surrounds it."""
    count = 0
    for node in graph.calls(_aten.native_group_norm.default):
        outs = [user for user in node.users if user.target is operator.getitem and user.users]
        if len(outs) == 1 and outs[0].args[1] == 0:
            _replace(graph, node, outs[0])
            count += 1
    return count


def _replace(graph: Graph, node: fx.Node, out: fx.Node) -> None:
    a = arguments(node)
    x, add = a["input"], None
    channels = shape(x)[:2]
    rows = [(x.args[i], x.args[1 - i]) for i in (0, 1)] if _is(x, _aten.add.Tensor) else []
    for image, row in rows:
        # An image of one position is no row: its additions have the shape of the image as well.
        if only_user(x) and _is_row(row, channels, shape(x)) and shape(image) == shape(x):
            x, add = image, _row(graph, node, row, channels)
            break
    last, scale, shift = _film(graph, out, channels)
    following = only_user(last)
    silu = following is not None and following.target is _aten.silu.default
    if silu:
        assert following is not None
        last = following
    rest = (add, scale, shift, silu, None)
    image = (
        x.args[0] if x.target is VIEW and shape(x.args[0])[:2] == channels else x
    )  # before its positions were joined
    call = graph.call(last, _NORM, image, None, a["group"], a["weight"], a["bias"], a["eps"], *rest)
    graph.replace(last, graph.call(last, VIEW, graph.item(call, 0), shape(last)))


def _film(graph: Graph, out: fx.Node, channels: list[int]) -> tuple[fx.Node, Any, Any]:
    """The last node of out · factor + shift, with scale = factor - 1 and shift as rows [N, C]; None for what is not."""
    last, scale, shift = out, None, None
    user = only_user(last)
    if user is not None and _is(user, _aten.mul.Tensor):
        factor = _other(user, last)
        if _is_row(factor, channels, shape(last)):
            last, scale = user, _minus_one(graph, user, factor, channels)
    user = only_user(last)
    if user is not None and _is(user, _aten.add.Tensor):
        added = _other(user, last)
        if _is_row(added, channels, shape(last)):
            last, shift = user, _row(graph, user, added, channels)
    return last, scale, shift


def _minus_one(graph: Graph, before: fx.Node, factor: fx.Node, channels: list[int]) -> fx.Node:
    """The scale whose factor is 1 + scale: what 1 was added to, where the network has written it so."""
    inner = factor
    while inner.target in (VIEW, _aten.unsqueeze.default):
        inner = inner.args[0]  # type: ignore[assignment]
    if _is(inner, _aten.add.Tensor) and inner.args[1] == 1:
        source = inner.args[0]
        if isinstance(source, fx.Node) and value(source).numel() == channels[0] * channels[1]:
            return _row(graph, before, source, channels)
    return _row(graph, before, graph.call(before, _aten.sub.Tensor, factor, 1), channels)


def _other(node: fx.Node, one: fx.Node) -> Any:
    """The other operand of two."""
    return node.args[1] if node.args[0] is one else node.args[0]


def _is(node: Any, target: Any) -> bool:
    """Whether a node is a call of the operator, of an addition one that scales nothing."""
    return isinstance(node, fx.Node) and node.target is target and bool(node.kwargs.get("alpha", 1) == 1)


def _is_row(node: Any, channels: list[int], image: list[int]) -> bool:
    """Whether a value is one number a sample and channel, to broadcast over an image's positions."""
    if not isinstance(node, fx.Node) or not isinstance(value(node), torch.Tensor) or len(image) < 3:
        return False
    return bool(shape(node) == [*channels, *(1,) * (len(image) - 2)] and value(node).is_floating_point())


def _row(graph: Graph, before: fx.Node, node: fx.Node, channels: list[int]) -> fx.Node:
    return graph.call(before, VIEW, node, channels)
