"""FiLM and activations after a normalisation, which `cmfast.kernels.group_norm` and `channel_norm` do as well."""

from typing import Any, NamedTuple

import torch
from torch import fx

from ..graph import VIEW, Graph, dtype, only_user, operands, shape, value

_aten = torch.ops.aten


class Film(NamedTuple):
    """What follows a normalised image: y · (1 + scale) + shift, then SiLU.

    Attributes:
        last: the node whose value is the result of all that.
        scale: [N, C] or None.
        shift: [N, C] or None.
        silu: whether the activation is there.
    """

    last: fx.Node
    scale: fx.Node | None
    shift: fx.Node | None
    silu: bool


def following(graph: Graph, out: fx.Node, channels: list[int]) -> Film:
    """Find what is done to the normalised image `out` with [N, C] = `channels` before anything else reads it."""
    last, scale, shift = out, None, None
    user = only_user(last)
    if user is not None and is_call(user, _aten.mul.Tensor):
        factor = other(user, last)
        scale = _minus_one(graph, user, factor, channels) if is_row(factor, channels, shape(last)) else None
        last = last if scale is None else user
    user = only_user(last)
    if user is not None and is_call(user, _aten.add.Tensor):
        added = other(user, last)
        if is_row(added, channels, shape(last)):
            last, shift = user, row(graph, user, added, channels)
    user = only_user(last)
    silu = user is not None and user.target is _aten.silu.default
    return Film(user if silu and user is not None else last, scale, shift, silu)


def _minus_one(graph: Graph, before: fx.Node, factor: fx.Node, channels: list[int]) -> fx.Node | None:
    """The scale whose factor is 1 + scale: what 1 was added to, where the network has written it so; else None.

    Of another factor, 1 + (factor - 1) would lose the digits of a small one.
    """
    inner = factor
    while inner.target in (VIEW, _aten.unsqueeze.default):
        inner = operands(inner)[0]
    if is_call(inner, _aten.add.Tensor) and operands(inner)[1] == 1:
        source = operands(inner)[0]
        if isinstance(source, fx.Node) and value(source).numel() == channels[0] * channels[1]:
            return row(graph, before, source, channels) if dtype(source) == torch.float32 else None
    return None


def other(node: fx.Node, one: fx.Node) -> Any:
    """The other operand of two."""
    return node.args[1] if node.args[0] is one else node.args[0]


def is_call(node: Any, target: Any) -> bool:
    """Whether a node is a call of the operator, of an addition one that scales nothing."""
    return isinstance(node, fx.Node) and node.target is target and bool(node.kwargs.get("alpha", 1) == 1)


def is_row(node: Any, channels: list[int], image: list[int]) -> bool:
    """Whether a value is one number a sample and channel, to broadcast over an image's positions."""
    return len(image) > 2 and dtype(node) == torch.float32 and shape(node) == [*channels, *(1,) * (len(image) - 2)]


def row(graph: Graph, before: fx.Node, node: fx.Node, channels: list[int]) -> fx.Node:
    """Such a value as [N, C]."""
    return graph.call(before, VIEW, node, channels)
