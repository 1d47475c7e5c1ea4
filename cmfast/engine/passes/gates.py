"""A product with an activated gate, the gated linear unit of transformers, is taken as a convolution reads it."""

import itertools
from typing import Any

import torch
from torch import fx

from ..graph import CONV, VIEW, Graph, arguments, change, dtype, only_user, shape

_aten = torch.ops.aten


def fuse(graph: Graph) -> int:
    """Let conv2d calls that read h · act(gate), of tensors of one shape, read the pair (h, gate)."""
    count = 0
    for node in graph.calls(CONV):
        a = arguments(node)
        read = a["h"]
        product = read.args[0] if read.target is VIEW else read
        pair = _factors(product) if only_user(read) and only_user(product) else None
        if pair is None or a["skip"] is not None or a["gain"] is not None or a["silu"]:
            continue
        h, gate, name = pair
        h, gate = (graph.call(node, VIEW, x, shape(read)) for x in (h, gate))
        change(node, h=h, skip=gate, gate=name)
        graph.erase(read)
        count += 1
    return count


def _factors(product: Any) -> tuple[fx.Node, fx.Node, str] | None:
    """Of a product h · act(gate): h, the gate, and the name of its activation."""
    if product.target is not _aten.mul.Tensor:
        return None
    for h, active in itertools.permutations(product.args):
        name = _activation(active)
        if not name or not isinstance(h, fx.Node) or not only_user(active) or shape(h) != shape(active):
            continue
        if dtype(h) == dtype(active) == torch.float32:
            return h, arguments(active)["self"], name
    return None


def _activation(node: Any) -> str | None:
    """The name of a gate's activation."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is _aten.silu.default:
        return "silu"
    if node.target is not _aten.gelu.default:
        return None
    return {"none": "gelu", "tanh": "gelu_tanh"}[arguments(node)["approximate"]]
