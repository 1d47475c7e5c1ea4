"""The sinusoids of timesteps, in their many spellings, become `cmfast.kernels.timestep_embedding`.

    angles = scale * (t[:, None] * frequencies)
    torch.cat([cos(angles), sin(angles)], -1)                 OpenAI's networks
    torch.cat([sin(angles), cos(angles)], -1)                 DDPM's
    torch.cat([y[:, F:], y[:, :F]], -1)                       of such y: diffusers' flip_sin_to_cos

The frequencies are constant. A product of t alone stays before the operator: each product is rounded as it was.
"""

import math
from typing import Any

import torch
from torch import fx

from ..graph import VIEW, Graph, arguments, only_user, operands, shape, value
from ..passes import constants

_aten = torch.ops.aten
_EMBEDDING = torch.ops.cmfast.timestep_embedding.default
#: The dtypes of timesteps whose conversion to float32 the operator does.
_CONVERTED = (
    *(torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def recognise(graph: Graph) -> int:
    """Replace each concatenation of cosines and sines of the same angles, and of such halves the other way round."""
    count = 0
    for node in graph.calls(_aten.cat.default):
        count += _replace(graph, node) or _swap(graph, node)
    if count:
        constants.fold(graph)
    return count


def _replace(graph: Graph, node: fx.Node) -> bool:
    halves = _halves(node)
    if halves is None or {half.target for half in halves} != {_aten.cos.default, _aten.sin.default}:
        return False
    angles = operands(halves[0])[0]
    if operands(halves[1])[0] is not angles or any(only_user(half) is None for half in halves):
        return False
    if len(angles.users) != 2 or value(angles).dtype != torch.float32:
        return False
    product, scale = _scaled(angles)
    factors = _factors(graph, product)
    if factors is None:
        return False
    t, frequencies = factors
    n, count = shape(angles)
    t = _unconverted(graph.call(node, VIEW, _unconverted(t), [n]))
    frequencies = graph.call(node, VIEW, frequencies, [count])
    sin_first = halves[0].target is _aten.sin.default
    graph.replace(node, graph.call(node, _EMBEDDING, t, frequencies, scale, sin_first, None))
    return True


def _swap(graph: Graph, node: fx.Node) -> bool:
    """Let the sines of an embedding change places with its cosines."""
    halves = _halves(node)
    if halves is None or any(half.target is not _aten.slice.Tensor for half in halves):
        return False
    second, first = map(arguments, halves)
    embedding = first["self"]
    if second["self"] is not embedding or embedding.target is not _EMBEDDING:
        return False
    width = shape(embedding)[1]
    for half, (begin, end) in ((first, (0, width // 2)), (second, (width // 2, width))):
        there = ((half["start"] or 0) % width, width if half["end"] is None else min(half["end"], width))
        if half["dim"] % 2 != 1 or half["step"] != 1 or there != (begin, end):
            return False
    t, frequencies, scale, sin_first, backend = operands(embedding)
    graph.replace(node, graph.call(node, _EMBEDDING, t, frequencies, scale, not sin_first, backend))
    return True


def _halves(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two parts of a concatenation of rows."""
    a = arguments(node)
    if len(a["tensors"]) != 2 or len(shape(node)) != 2 or a["dim"] % 2 != 1:
        return None
    return tuple(a["tensors"])


def _scaled(angles: fx.Node) -> tuple[fx.Node, float]:
    """What the angles are a multiple of by numbers, and that multiple.

    The product of two numbers multiplies as they do one after the other where one of them is a power of two.
    """
    scale = 1.0
    while angles.target is _aten.mul.Tensor and isinstance(operands(angles)[1], int | float):
        factor = float(operands(angles)[1])
        if not (_is_power_of_two(factor) or _is_power_of_two(scale)) or only_user(operands(angles)[0]) is None:
            break
        angles, scale = operands(angles)[0], scale * factor
    return angles, scale


def _is_power_of_two(number: float) -> bool:
    return abs(math.frexp(number)[0]) == 0.5


def _factors(graph: Graph, product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Timesteps, one a row, and constant frequencies, one a column, of whose products a matrix consists."""
    if product.target not in (_aten.mul.Tensor, _aten.mm.default):
        return None
    n, count = shape(product)
    pairs = [operands(product)] if product.target is _aten.mm.default else [operands(product), operands(product)[::-1]]
    for t, frequencies in pairs:
        if not isinstance(t, fx.Node) or graph.tensor(frequencies) is None or value(frequencies).dtype != torch.float32:
            continue
        is_column = shape(t) == [n, 1] or (n == 1 and value(t).numel() == 1)
        if is_column and shape(frequencies) in ([1, count], [count]) and _is_converted(t):
            return t, frequencies
    return None


def _is_converted(t: fx.Node) -> bool:
    return value(t).dtype in _CONVERTED


def _unconverted(t: fx.Node) -> fx.Node:
    """Timesteps as they are before they are converted to float32."""
    if t.target is not _aten._to_copy.default or value(t).dtype != torch.float32:
        return t
    given: dict[str, Any] = arguments(t)
    source: fx.Node = given.pop("self")
    others = {name: x for name, x in given.items() if name != "dtype"}
    return source if _is_converted(source) and not any(others.values()) else t
