"""Attention written as two batched products with a softmax between them becomes `cmfast.kernels.attention`.

That is what is left of einsum, matmul, bmm and baddbmm: bmm of [N·H, T, D] and [N·H, D, S], perhaps scaled, a softmax
over the keys, and bmm with the values [N·H, S, D]; or all of it transposed. Scores to which anything else is done, such
as a mask, are no such attention.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from ..graph import PERMUTE, VIEW, Graph, arguments, only_user, operands, origin, shape, value
from ..passes import views

_aten = torch.ops.aten
_ATTENTION = torch.ops.cmfast.attention.default


class _Scores(NamedTuple):
    queries: fx.Node  # [N·H, T, D]
    keys: fx.Node  # [N·H, D, S]
    scale: float


def recognise(graph: Graph) -> int:
    """Replace each softmax between two batched products."""
    count = 0
    for softmax in graph.calls(_aten._softmax.default, _aten._safe_softmax.default):
        dims = len(shape(softmax))
        if dims and operands(softmax)[1] % dims == dims - 1 and value(softmax).dtype == torch.float32:
            count += _replace(graph, softmax)
    if count:
        graph.nodes.eliminate_dead_code()
        views.join(graph)
    return count


def _replace(graph: Graph, softmax: fx.Node) -> bool:
    scores = _scores(softmax)
    product, values, transposed = _product(softmax)
    if scores is None or product is None or values is None:
        return False
    batch, _, size = shape(scores.queries)
    if shape(values)[1 if transposed else 2] != size or 0 in (batch, size, shape(softmax)[-1]):
        return False  # the kernels have values of the size of the keys
    q, q_scale = _unscaled(graph, scores.queries)
    k, k_scale = _unscaled(graph, scores.keys)
    samples = _samples(q)
    q = _heads(graph, product, q, samples, transposed=False)
    k = _heads(graph, product, k, samples, transposed=True)
    v = _heads(graph, product, values, samples, transposed=transposed)
    out = graph.item(graph.call(product, _ATTENTION, q, k, v, scores.scale * q_scale * k_scale, None), 0)
    if transposed:
        out = graph.call(product, PERMUTE, out, [0, 1, 3, 2])
    graph.replace(product, graph.call(product, VIEW, out, shape(product)))
    return True


def _scores(softmax: fx.Node) -> _Scores | None:
    """The product, perhaps scaled and of another shape, that the softmax is of."""
    x, scale, rows = operands(softmax)[0], 1.0, shape(softmax)[-2:]
    while isinstance(x, fx.Node) and only_user(x) is not None:
        factor = _factor(x)
        if x.target is _aten.bmm.default and shape(x)[-2:] == rows:
            queries, keys = operands(x)
            return _Scores(queries, keys, scale)
        if x.target is _aten.baddbmm.default and shape(x)[-2:] == rows:
            a = arguments(x)
            return _Scores(a["batch1"], a["batch2"], scale * a["alpha"]) if a["beta"] == 0 else None
        if factor is not None:
            scale *= factor
        elif x.target is not VIEW:
            return None
        x = operands(x)[0]
    return None


def _product(softmax: fx.Node) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """The product of the softmax's result with the values, those, and whether all of it is transposed."""
    node = softmax
    while (user := only_user(node)) is not None and user.target in (VIEW, PERMUTE):
        node = user
    if user is None or user.target is not _aten.bmm.default or user.args[0] is user.args[1]:
        return None, None, False
    _, lay = origin(node, softmax)
    rows, keys = shape(softmax)[-2:]
    transposed = user.args[1] is node
    wanted = torch.empty(shape(node)[0], rows, keys, device="meta")
    if lay is None or not _same(lay, wanted.transpose(1, 2) if transposed else wanted):
        return None, None, False
    return user, operands(user)[0 if transposed else 1], transposed


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are the same view of their memory."""
    strides = zip(x.shape, x.stride(), y.stride(), strict=True) if x.shape == y.shape else [(2, 0, 1)]
    return all(size == 1 or a == b for size, a, b in strides)


def _factor(node: Any) -> float | None:
    """The number that a node's value is multiplied by, or divided."""
    if node.target in (_aten.mul.Tensor, _aten.mul.Scalar) and isinstance(node.args[1], int | float):
        return float(node.args[1])
    if node.target in (_aten.div.Tensor, _aten.div.Scalar) and isinstance(node.args[1], int | float):
        return 1.0 / node.args[1]
    return None


def _unscaled(graph: Graph, x: fx.Node) -> tuple[fx.Node, float]:
    """What x is a multiple of, and the factor: the multiplication may come before x is viewed and permuted."""
    chain: list[fx.Node] = []
    inner = x
    while inner.target in (VIEW, PERMUTE):
        chain.append(inner)
        inner = operands(inner)[0]
    factor = _factor(inner)
    if factor is None or value(operands(inner)[0]).dtype != torch.float32:
        return x, 1.0
    source: fx.Node = operands(inner)[0]
    for node in reversed(chain):
        source = graph.call(x, node.target, source, operands(node)[1])
    return source, factor


def _samples(x: fx.Node) -> int:
    """The number of samples of queries [N·H, T, D], by the first view that has samples and heads apart.

    Where it does not show, all heads are samples of their own.
    """
    count = shape(x)[0]
    node = x
    while node.target in (VIEW, PERMUTE):
        node = operands(node)[0]
        first = shape(node)[0] if shape(node) else 0
        if 0 < first < count and count % first == 0:
            return first
    return count


def _heads(graph: Graph, before: fx.Node, x: fx.Node, samples: int, *, transposed: bool) -> fx.Node:
    """[N, H, T, D] of x [N·H, T, D], or of its transpose [N·H, D, T].

    It is a view of what x is a view of, by dimensions of which none has to be joined with another: N and H in one
    dimension are no view of channels that lie innermost.
    """
    root, lay = origin(x)
    heads = shape(x)[0] // samples
    if lay is not None:
        strides = lay.stride()
        sizes = [heads, *shape(x)[1:]]
        nested = sorted(range(3), key=lambda d: (sizes[d] == 1, -strides[d]))
        steps = [math.prod(sizes[d] for d in nested[i + 1 :]) for i in range(3)]
        dense = all(sizes[d] == 1 or strides[d] == step for d, step in zip(nested, steps, strict=True))
        if dense and value(root).numel() == value(x).numel() and _outermost(lay, heads, samples):
            apart = graph.call(before, VIEW, root, [samples, *(sizes[d] for d in nested)])
            order = [0, *(1 + nested.index(d) for d in ((0, 2, 1) if transposed else (0, 1, 2)))]
            return graph.call(before, PERMUTE, apart, order)
    found = graph.call(before, VIEW, x, [samples, heads, *shape(x)[1:]])
    return graph.call(before, PERMUTE, found, [0, 1, 3, 2]) if transposed else found


def _outermost(lay: torch.Tensor, heads: int, samples: int) -> bool:
    """Whether the samples of [N·H, ...] are one after the other in memory."""
    return samples == 1 or lay.stride(0) * heads * samples == lay.numel()
