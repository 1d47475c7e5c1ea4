"""A linear layer of the tokens that an image's positions are is a 1 × 1 convolution of that image.

So is a convolution of the positions in a row. Then a group norm before it can be folded into it, and what is added to
its result can be an image.
"""

from typing import Any

from torch import fx

from ..graph import CONV, PERMUTE, VIEW, Graph, arguments, operands, shape
from . import views


def unfold(graph: Graph) -> int:
    """Let conv2d calls of kernel 1 that read views of an image [N, C, H, W] read the image itself."""
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        if not _plain(a):
            continue
        view, tokens = a["h"], a["h"].args[0]
        out = graph.item(node, 0)
        if shape(view)[:2] == shape(tokens)[:2] and len(shape(tokens)) > 3:  # positions in a row
            new = _convolution(graph, node, a, tokens)
            graph.replace(out, graph.call(out, VIEW, new, shape(out)))
        elif _are_tokens(tokens, view):
            order, spatial = tokens.args[1], shape(tokens.args[0])[2:]
            new = _convolution(graph, node, a, tokens.args[0])
            apart = graph.call(out, VIEW, new, [*shape(new)[:2], *spatial])
            graph.replace(out, graph.call(out, VIEW, graph.call(out, PERMUTE, apart, order), shape(out)))
        else:
            continue
        count += 1
    if count:
        views.join(graph)
    return count


def _plain(a: dict[str, Any]) -> bool:
    """Whether a conv2d call is of kernel 1, takes a view and does nothing else."""
    others = ("skip", "gain", "residual", "resample")
    alone = a["stride"] == 1 and not a["padding"] and all(a[name] is None for name in others) and not a["moments"]
    return alone and shape(a["weight"])[2:] == [1, 1] and a["h"].target is VIEW


def _are_tokens(tokens: fx.Node, rows: fx.Node) -> bool:
    """Whether rows [N·T, C, 1, 1] are the positions of an image, their channels in the last dimension of `tokens`."""
    if tokens.target is not PERMUTE:
        return False
    source, order = operands(tokens)
    last = [0, *range(2, len(shape(source))), 1]
    return list(order) == last and shape(rows)[1:] == [shape(source)[1], 1, 1]


def _convolution(graph: Graph, node: fx.Node, a: dict[str, Any], image: fx.Node) -> fx.Node:
    """The same convolution of an image of any number of spatial dimensions, as [N, C, H, W]."""
    source = operands(image)[0] if image.target is VIEW else image
    if shape(source)[:2] != shape(image)[:2]:
        source = image
    n, channels, *sizes = shape(source)
    if len(sizes) != 2:
        source = graph.call(node, VIEW, source, [n, channels, -1, sizes[-1] if len(sizes) > 2 else 1])
    return graph.item(graph.call(node, CONV, **(a | {"h": source})), 0)
