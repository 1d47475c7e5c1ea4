"""From a graph to steps: calls of a target's kernels, and of torch for what they lack.

Views cost nothing: they are taken of the values without data. Where one needs a copy, torch makes it. What kernels read
as an image has its channels adjacent; anything else lies as torch would lay it.
"""

import dataclasses
import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import by_torch
from .graph import STRIDED, Graph, arguments
from .layouts import READERS, ROWS, images
from .steps import Step, Steps

_aten = torch.ops.aten

#: Operators that only copy: where nothing is written in place, the result may be what they copy.
_COPIES = (_aten.clone.default, _aten.alias.default, _aten.detach.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


#: Takes the steps so far, a node, and its arguments by name with tensors without data. It adds the node's steps and
#: returns its values, or says why the kernels cannot serve it.
Serve = Callable[[Steps, fx.Node, dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a target's kernels serve.

    Attributes:
        served: how each operator becomes steps.
        fits: whether an operator's kernel can read an image as it lies.
        missing: why torch serves all other operators.
    """

    served: Mapping[Any, Serve]
    fits: Callable[[Any, Tensor], bool]
    missing: str


def lower(graph: Graph, kernels: Kernels) -> Steps:
    """The steps that compute the graph."""
    steps = Steps()
    values: dict[fx.Node, Any] = {}
    as_images = images(graph)
    for node in graph.nodes.nodes:
        if node.op == "placeholder":
            steps.give(node.meta["val"], image=node in as_images)
            values[node] = steps.inputs[-1]
        elif node.op == "get_attr":
            values[node] = graph.tensors[str(node.target)]
        elif node.op == "output":
            steps.want(fx.node.map_arg(node.args[0], values.__getitem__))
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            given = fx.node.map_arg(arguments(node), values.__getitem__)
            values[node] = _call(steps, node, given, kernels, as_images)
    return steps


def _call(steps: Steps, node: fx.Node, given: dict[str, Any], kernels: Kernels, as_images: Container[fx.Node]) -> Any:
    reason = kernels.missing
    if node.target in kernels.served:
        for name in READERS.get(node.target, ()):
            if isinstance(given[name], Tensor) and not kernels.fits(node.target, given[name]):
                given = given | {name: _image(steps, node, given[name])}
        result = kernels.served[node.target](steps, node, given)
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
            return _add(steps, node, _aten.reshape.default, given, as_images, "a view that needs a copy")
    if node.target in STRIDED:
        name = str(node.target).removesuffix(".default")
        return _add(steps, node, _strided(node), given, as_images, "it names strides", name)
    return _add(steps, node, node.target, given, as_images, reason)


def _image(steps: Steps, node: fx.Node, x: Tensor) -> Tensor:
    """A copy of x that the kernels can read."""
    out = steps.image(x.shape, x.dtype)
    reason = "its channels or its positions are not adjacent"
    steps.add(Step(node.name, "aten.clone", by_torch.Computed.of(_aten.alias.default), ([out], {"self": x}), reason))
    return out


def _strided(node: fx.Node) -> Any:
    """An operator of strides, such as as_strided: its input is copied to where it lay when it was captured."""
    source = node.args[0] if node.args else node.kwargs["self"]
    assert isinstance(source, fx.Node)
    lay = source.meta["val"]

    def apply(**arguments: Any) -> Any:
        x = arguments.pop("self")
        memory = x.new_empty(lay.untyped_storage().nbytes() // lay.element_size())
        there = memory.as_strided(lay.shape, lay.stride(), lay.storage_offset()).copy_(x)
        return node.target(there, **arguments)  # type: ignore[operator]

    return apply


def _add(
    steps: Steps,
    node: fx.Node,
    target: Any,
    given: dict[str, Any],
    as_images: Container[fx.Node],
    reason: str,
    name: str | None = None,
) -> Any:
    """Let torch compute it, unless it is a view of what is there."""
    computed = by_torch.InMemoryOrder(target) if target in by_torch.IN_MEMORY_ORDER else target
    without_data = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), given)
    result = computed(**pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), without_data))
    single = isinstance(result, Tensor)
    parts = [result] if single else list(result)
    if all(steps.owns(part) for part in parts):
        return result
    readers = {0: node} if single else {user.args[1]: user for user in node.users}
    rows = ROWS.get(target, ())
    outs = []
    for i, part in enumerate(parts):
        if readers.get(i) in as_images:
            outs.append(steps.image(part.shape, part.dtype))
        else:
            outs.append(steps.keep(_dense(part) if i in rows else torch.empty_like(part)))
    call = by_torch.Computed.of(computed)
    steps.add(Step(node.name, name or str(target).removesuffix(".default"), call, (outs, given), reason))
    return outs[0] if single else outs


def _dense(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, device="meta")
