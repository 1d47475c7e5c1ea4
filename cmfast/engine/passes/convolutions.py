"""Let `cmfast.kernels.conv2d` take what it can: convolutions of one to three spatial dimensions, and linear layers.

A linear layer is a convolution of 1 × 1 on images of one position.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ..graph import CONV, VIEW, Graph, arguments, dtype, shape

_aten = torch.ops.aten


def prepare(graph: Graph) -> int:
    """Replace aten's convolutions and linear layers by conv2d of weights that are yet to be packed."""
    count = 0
    for node in graph.calls(_aten.convolution.default):
        count += _convolution(graph, node)
    for node in graph.calls(_aten.addmm.default, _aten.mm.default):
        count += _linear(graph, node)
    return count


def _convolution(graph: Graph, node: fx.Node) -> bool:
    a = arguments(node)
    weight = graph.tensor(a["weight"])
    if weight is None or not 3 <= weight.ndim <= 5 or a["transposed"] or a["groups"] != 1:
        return False
    if not _of_float32(a["input"], a["weight"], a["bias"]):
        return False
    if any(d != 1 for d in a["dilation"]):
        return False
    padding = tuple(p for p in a["padding"] for _ in range(2))
    graph.replace(node, _conv(graph, node, a["input"], a["weight"], a["bias"], tuple(a["stride"]), padding))
    return True


def _linear(graph: Graph, node: fx.Node) -> bool:
    a = arguments(node)
    matrix, bias = graph.tensor(a["mat2"]), a.get("self") if node.target is _aten.addmm.default else None
    x = a["mat1"] if node.target is _aten.addmm.default else a["self"]
    if (
        matrix is None
        or (bias is not None and _not_a_row(graph, bias, matrix))
        or (a.get("alpha", 1), a.get("beta", 1)) != (1, 1)
        or not _of_float32(x, a["mat2"], bias)
    ):
        return False
    weight = graph.attribute(f"{a['mat2'].target} transposed as 1x1", matrix.t()[:, :, None, None], node)
    out = _conv(graph, node, graph.call(node, VIEW, x, [*shape(x), 1, 1]), weight, bias)
    graph.replace(node, graph.call(node, VIEW, out, shape(node)))
    return True


def _of_float32(*nodes: Any) -> bool:
    """Whether all values that there are have the dtype of the engine's."""
    return all(node is None or dtype(node) == torch.float32 for node in nodes)


def _not_a_row(graph: Graph, bias: fx.Node, matrix: Tensor) -> bool:
    row = graph.tensor(bias)
    return row is None or row.shape != matrix.shape[1:]


def _conv(
    graph: Graph,
    before: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0, 0, 0),
) -> fx.Node:
    plain: dict[str, Any] = {"tile": 1, "transformed": False, "stride": stride, "padding": padding}
    plain |= {"dtype": torch.float32, "silu": False, "relu": False, "moments": False}
    absent = dict.fromkeys(a.name for a in CONV._schema.arguments)
    call = graph.call(before, CONV, **(absent | plain | {"h": x, "weight": weight, "bias": bias}))
    return graph.item(call, 0)
