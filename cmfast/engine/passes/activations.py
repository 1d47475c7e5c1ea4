"""A SiLU before a convolution or a linear layer is applied as it reads its input."""

import torch
from torch import fx

from ..graph import CONV, VIEW, Graph, arguments, change, shape

_SILU = torch.ops.aten.silu.default


def fuse(graph: Graph) -> int:
    """Let conv2d calls activate what they read."""
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        x = a["h"]
        if a["skip"] is not None or a["gain"] is not None or a["silu"]:
            continue
        if x.target is _SILU:
            change(node, h=x.args[0], silu=True)
        elif x.target is VIEW and isinstance(x.args[0], fx.Node) and x.args[0].target is _SILU:
            change(node, h=graph.call(node, VIEW, x.args[0].args[0], shape(x)), silu=True)
        else:
            continue
        graph.erase(x)
        count += 1
    return count
