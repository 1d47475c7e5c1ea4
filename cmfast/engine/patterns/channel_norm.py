"""Layer norms and RMS norms, in their many spellings, become `cmfast.kernels.channel_norm`.

    torch.nn.functional.layer_norm(x, [C], ...)                 tokens [..., C]
    torch.nn.functional.normalize(x, dim) · w · √C              images [N, C, *spatial] and tokens
    x · rsqrt(mean(x²) + eps) · w                               both

with FiLM and SiLU after those of images.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..graph import PERMUTE, VIEW, Graph, arguments, layer, only_user, operands, shape, value
from ..passes import constants, views
from .film import following, is_call, other

_aten = torch.ops.aten
_NORM = torch.ops.cmfast.channel_norm.default


@dataclasses.dataclass
class _Norm:
    """A normalisation that was found.

    Attributes:
        x: what is normalised.
        out: the normalised values.
        dim: of the channels.
        centred, eps, least: as channel_norm's.
        factor: that the result of channel_norm is to be multiplied by.
    """

    x: fx.Node
    out: fx.Node
    dim: int
    eps: float = 0.0
    least: float = 0.0
    centred: bool = False
    factor: float = 1.0
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def recognise(graph: Graph) -> int:
    """Replace each normalisation over one dimension: the last, or the channels of an image."""
    count = 0
    for node in graph.calls(_aten.native_layer_norm.default, _aten.div.Tensor, _aten.mul.Tensor):
        found = _FINDERS[node.target](graph, node)
        if found is None or not value(found.x).numel():
            continue
        if {value(found.x).dtype, value(found.out).dtype} != {torch.float32}:
            continue
        _replace(graph, found)
        count += 1
    if count:
        constants.fold(graph)
        views.join(graph)
    return count


def _layer_norm(graph: Graph, node: fx.Node) -> _Norm | None:
    a = arguments(node)
    outs = [user for user in node.users if user.target is operator.getitem and user.users]
    if len(a["normalized_shape"]) != 1 or len(shape(a["input"])) < 2 or len(outs) != 1 or outs[0].args[1] != 0:
        return None
    last = len(shape(a["input"])) - 1
    norm = _Norm(a["input"], outs[0], last, a["eps"], centred=True)
    norm.weight, norm.bias = a["weight"], a["bias"]
    return norm


def _normalize(graph: Graph, node: fx.Node) -> _Norm | None:
    """Of x / max(‖x‖, e) the mean square is at least e² / C, and 1 / ‖x‖ is that of the mean square by √C."""
    x, length = operands(node)
    if not isinstance(x, fx.Node) or not isinstance(length, fx.Node):
        return None
    if length.target is _aten.expand.default:
        length = operands(length)[0]
    if length.target is not _aten.clamp_min.default:
        return None
    norm, least = operands(length)
    if norm.target is not _aten.linalg_vector_norm.default or not isinstance(least, int | float):
        return None
    a = arguments(norm)
    if a["self"] is not x:
        return None
    dim = _dim(x, a["dim"])
    if a["ord"] != 2 or not a["keepdim"] or a["dtype"] is not None or dim is None:
        return None
    channels = shape(x)[dim]
    return _Norm(x, node, dim, least=least**2 / channels, factor=channels**-0.5)


def _rms_norm(graph: Graph, node: fx.Node) -> _Norm | None:
    """An RMS norm spelled x · rsqrt(mean(x²) + eps)."""
    for x, factor in (operands(node), operands(node)[::-1]):
        if not isinstance(x, fx.Node) or not isinstance(factor, fx.Node) or factor.target is not _aten.rsqrt.default:
            continue
        square, eps = operands(factor)[0], 0.0
        if is_call(square, _aten.add.Tensor) and isinstance(operands(square)[1], int | float):
            square, eps = operands(square)
        if not isinstance(square, fx.Node) or square.target is not _aten.mean.dim:
            continue
        a = arguments(square)
        squared = a["self"]
        power = squared.target is _aten.pow.Tensor_Scalar and operands(squared) == (x, 2)
        dim = _dim(x, a["dim"])
        if (power or (squared.target is _aten.mul.Tensor and operands(squared) == (x, x))) and a["keepdim"] and dim:
            return _Norm(x, node, dim, eps)
    return None


_FINDERS: dict[Any, Callable[[Graph, fx.Node], _Norm | None]] = {
    _aten.native_layer_norm.default: _layer_norm,
    _aten.div.Tensor: _normalize,
    _aten.mul.Tensor: _rms_norm,
}


def _dim(x: fx.Node, dims: Any) -> int | None:
    """The one dimension, if it is the channels of an image or the last one, and not the samples."""
    count = len(shape(x))
    if dims is None or len(dims) != 1 or count < 2:
        return None
    dim = dims[0] % count
    return dim if dim in (1, count - 1) and dim else None


def _replace(graph: Graph, norm: _Norm) -> None:
    channels = shape(norm.x)[norm.dim]
    _take_factors(graph, norm, channels)
    last, scale, shift, silu = norm.out, None, None, False
    if norm.dim == 1 and len(shape(norm.x)) > 2:
        last, scale, shift, silu = following(graph, norm.out, shape(norm.x)[:2])
    weight, bias = (None if t is None else graph.call(last, VIEW, t, [channels]) for t in (norm.weight, norm.bias))
    if abs(norm.factor - 1) > 1e-12:
        if weight is None:
            ones = torch.full((channels,), norm.factor, dtype=torch.float32)
            weight = graph.attribute(f"constant [{channels}] of {norm.factor}", ones, last)
        else:
            weight = graph.call(last, _aten.mul.Tensor, weight, norm.factor)
    x, order = norm.x, [0, *range(2, len(shape(norm.x))), 1]
    of_image = norm.dim > 1 and x.target is PERMUTE and list(operands(x)[1]) == order
    if of_image:
        x = operands(x)[0]
    elif norm.dim > 1 and norm.dim == len(shape(x)) - 1:
        x = graph.call(last, VIEW, x, [-1, channels])
    call = graph.call(last, _NORM, x, weight, bias, norm.eps, norm.centred, norm.least, scale, shift, silu, None)
    call.meta["layer"] = layer(norm.out)
    out = graph.call(last, PERMUTE, call, order) if of_image else graph.call(last, VIEW, call, shape(last))
    graph.replace(last, out)


def _take_factors(graph: Graph, norm: _Norm, channels: int) -> None:
    """Take the weights and numbers that the normalised values are multiplied by, and a bias that is added."""
    row = [1] * len(shape(norm.out))
    row[norm.dim] = channels
    while norm.bias is None and (user := only_user(norm.out)) is not None:
        if is_call(user, _aten.mul.Tensor):
            factor = other(user, norm.out)
            if isinstance(factor, int | float):
                norm.factor *= factor
            elif norm.weight is None and _is_parameter(graph, factor, row):
                norm.weight = factor
            else:
                return
        elif is_call(user, _aten.add.Tensor) and _is_parameter(graph, other(user, norm.out), row):
            norm.bias = other(user, norm.out)
        else:
            return
        norm.out = user


def _is_parameter(graph: Graph, node: Any, row: list[int]) -> bool:
    """Whether a value is one number a channel, of the network and not of its inputs."""
    if not isinstance(node, fx.Node) or graph.tensor(node) is None or value(node).dtype != torch.float32:
        return False
    sizes = shape(node)
    return [1] * (len(row) - len(sizes)) + sizes == row
