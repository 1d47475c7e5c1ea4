"""torch's group norm, with addition before and FiLM and SiLU after it, becomes `cmfast.kernels.group_norm`."""

import operator

import torch
from torch import fx

from ..graph import VIEW, Graph, arguments, dtype, layer, only_user, shape
from .film import following, is_call, is_row, row

_aten = torch.ops.aten
_NORM = torch.ops.cmfast.group_norm.default


def recognise(graph: Graph) -> int:
    """Replace each group norm of which only the normalised values are read, with what surrounds it."""
    count = 0
    for node in graph.calls(_aten.native_group_norm.default):
        if dtype(arguments(node)["input"]) != torch.float32:
            continue
        outs = [user for user in node.users if user.target is operator.getitem and user.users]
        if len(outs) == 1 and outs[0].args[1] == 0:
            _replace(graph, node, outs[0])
            count += 1
    return count


def _alike(image: fx.Node, x: fx.Node) -> bool:
    return shape(image) == shape(x) and dtype(image) == dtype(x)


def _replace(graph: Graph, node: fx.Node, out: fx.Node) -> None:
    a = arguments(node)
    x, add = a["input"], None
    channels = shape(x)[:2]
    rows = [(x.args[i], x.args[1 - i]) for i in (0, 1)] if is_call(x, _aten.add.Tensor) else []
    for image, added in rows:
        # An image of one position is no row: its additions have the shape of the image as well.
        if only_user(x) and is_row(added, channels, shape(x)) and _alike(image, x):
            x, add = image, row(graph, node, added, channels)
            break
    last, scale, shift, silu = following(graph, out, channels)
    image = x
    if len(shape(x)) != 4 and x.target is VIEW and shape(x.args[0])[:2] == channels:
        image = x.args[0]  # before its positions were joined
    rest = (add, scale, shift, silu, None)
    call = graph.call(last, _NORM, image, None, a["group"], a["weight"], a["bias"], a["eps"], *rest)
    call.meta["layer"] = layer(node)
    graph.replace(last, graph.call(last, VIEW, graph.item(call, 0), shape(last)))
