"""From a graph to steps: calls of the CPU kernels, and of torch for what they lack.

Views cost nothing: they are taken of the values without data. Where one needs a copy, torch makes it.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph import Graph, arguments
from ..steps import Step, Steps
from .served import ROWS, SERVED

_aten = torch.ops.aten

#: Operators that only copy: where nothing is written in place, the result may be what they copy.
_COPIES = (_aten.clone.default, _aten.alias.default, _aten.detach.default)
#: Operators of strides in memory.
_STRIDED = (_aten.as_strided.default, _aten.as_strided_copy.default, _aten.as_strided_scatter.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


def lower(graph: Graph, products: torch.dtype) -> Steps:
    """The steps that compute the graph; `products` is the dtype of the operands of attention's products."""
    steps = Steps()
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes.nodes:
        if node.op == "placeholder":
            steps.give(node.meta["val"])
            values[node] = steps.inputs[-1]
        elif node.op == "get_attr":
            values[node] = graph.tensors[str(node.target)]
        elif node.op == "output":
            steps.want(fx.node.map_arg(node.args[0], values.__getitem__))
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = _call(steps, node, fx.node.map_arg(arguments(node), values.__getitem__), products)
    return steps


def _call(steps: Steps, node: fx.Node, given: dict[str, Any], products: torch.dtype) -> Any:
    reason = "the CPU kernels have no such operator"
    if node.target in SERVED:
        result = SERVED[node.target](steps, node, given, products)
        if not isinstance(result, str):
            return result
        reason = result
    if node.target in _COPIES:
        return given["self"]
    if node.target in _VIEWS:
        try:
            return given["self"].view(given["size"])
        except RuntimeError:
            given = {"self": given["self"], "shape": given["size"]}
            return _by_torch(steps, node, _aten.reshape.default, given, "a view that needs a copy")
    if node.target in _STRIDED:
        return _strided(steps, node, given)
    return _by_torch(steps, node, node.target, given, reason)


def _strided(steps: Steps, node: fx.Node, given: dict[str, Any]) -> Any:
    """An operator of strides, such as as_strided: its input is copied to where it lay when it was captured."""
    source = node.args[0] if node.args else node.kwargs["self"]
    assert isinstance(source, fx.Node)
    lay = source.meta["val"]

    def apply(**arguments: Any) -> Any:
        x = arguments.pop("self")
        memory = x.new_empty(lay.untyped_storage().nbytes() // lay.element_size())
        there = memory.as_strided(lay.shape, lay.stride(), lay.storage_offset()).copy_(x)
        return node.target(there, **arguments)  # type: ignore[operator]

    return _by_torch(steps, node, apply, given, "it names strides", str(node.target))


def _by_torch(
    steps: Steps, node: fx.Node, target: Any, given: dict[str, Any], reason: str, name: str | None = None
) -> Any:
    """Let torch compute it, unless it is a view of what is there."""
    without_data = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), given)
    result = target(**pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), without_data))
    parts = [result] if isinstance(result, Tensor) else list(result)
    if all(steps.owns(part) for part in parts):
        return result
    rows = ROWS.get(target, ())
    outs = [
        steps.image(part.shape, part.dtype)
        if part.ndim > 2 and part.is_floating_point() and i not in rows
        else steps.keep(_dense(part))
        for i, part in enumerate(parts)
    ]
    name = (name or str(target)).removesuffix(".default")
    steps.add(Step(node.name, name, _Computed(target), (outs, given), reason))
    return outs[0] if isinstance(result, Tensor) else outs


def _dense(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class _Computed:
    """Compute with torch and keep the results where they are expected."""

    target: Any

    def __call__(self, outs: Sequence[Tensor], given: dict[str, Any]) -> None:
        result = self.target(**given)
        for out, part in zip(outs, [result] if isinstance(result, Tensor) else result, strict=True):
            out.copy_(part)
