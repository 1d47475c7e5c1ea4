"""From a graph to steps: calls of a target's kernels, and of torch for what they lack.

Views cost nothing: they are taken of the values without data. Where one needs a copy, torch makes it. What kernels read
as an image has its channels adjacent; anything else lies as torch would lay it. Which dtype values have is in `dtypes`.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import by_torch, dtypes, without_data
from .graph import STRIDED, Graph, arguments
from .layouts import READERS, ROWS, images
from .steps import Step, Steps

_aten = torch.ops.aten

#: Operators that only copy: where nothing is written in place, the result may be what they copy.
_COPIES = (_aten.clone.default, _aten.alias.default, _aten.detach.default)
#: Operators of torch that read memory as it lies: a copy in front of them was for its strides.
_CONTIGUOUS = (
    _aten.view_as_complex.default,
    _aten.view.dtype,
    _aten._pdist_forward.default,
    _aten.linalg_matrix_exp.default,
)
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
        dtype: in which images are held; None leaves all values in the graph's dtypes.
    """

    served: Mapping[Any, Serve]
    fits: Callable[[Any, Tensor], bool]
    missing: str
    dtype: torch.dtype | None = None


def lower(graph: Graph, kernels: Kernels, steps: Steps | None = None) -> Steps:
    """The steps that compute the graph."""
    return _Lowering(graph, kernels, steps or Steps()).run()


def copied(steps: Steps, node: fx.Node, x: Tensor, out: Tensor, reason: str) -> Tensor:
    """Let torch copy x to `out`, a value that the next step writes."""
    copy_step(steps, node.name, out, x, reason)
    return out


def copy_step(steps: Steps, name: str, out: Tensor, x: Tensor, reason: str) -> None:
    """Add a step in which torch copies x, which may be spread, to `out`, for the node of this name."""
    steps.add(Step(name, "aten.clone", by_torch.Computed.of(_aten.alias.default), ([out], {"self": x}), reason))


class _Lowering:
    def __init__(self, graph: Graph, kernels: Kernels, steps: Steps) -> None:
        self.graph, self.kernels, self.steps = graph, kernels, steps
        self.as_images = images(graph)

    def run(self) -> Steps:
        values: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            # Tensors are looked up as they are read: some are given up once their last reader has them in its own way.
            return self.graph.tensors[str(node.target)] if node.op == "get_attr" else values[node]

        for node in self.graph.nodes.nodes:
            if node.op == "placeholder":
                like, dtype = node.meta["val"], dtypes.of_input(node, self.kernels.dtype)
                self.steps.give(like.to(dtype), image=node in self.as_images)
                values[node] = self.steps.inputs[-1]
            elif node.op == "output":
                self.steps.want(fx.node.map_arg(node.args[0], value))
            elif node.target is operator.getitem:
                values[node] = values[node.args[0]][node.args[1]]
            elif node.op != "get_attr":
                done = len(self.steps.steps)
                values[node] = self._call(node, fx.node.map_arg(arguments(node), value))
                for step in self.steps.steps[done:]:
                    step.node = node
        return self.steps

    def _call(self, node: fx.Node, given: dict[str, Any]) -> Any:
        reason = self.kernels.missing
        if node.target in self.kernels.served and _has_no_elements(node):
            return self._nothing(node)
        if node.target in self.kernels.served:
            given = self._images(node, given)
            result = self.kernels.served[node.target](self.steps, node, given)
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
                return self._by_torch(node, _aten.reshape.default, given, "a view that needs a copy")
        if node.target in STRIDED:
            return self._by_torch(node, _strided(node), given, "it names strides", _name(node.target))
        return self._by_torch(node, node.target, given, reason)

    def _images(self, node: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments with images that the kernels can read: copies, where they cannot."""
        read = {name: given[name] for name in READERS.get(node.target, ()) if isinstance(given[name], Tensor)}
        dtype = dtypes.of_images(node, list(read.values()), self.kernels.dtype)
        for name, x in read.items():
            wanted = dtype or x.dtype
            fits = self.kernels.fits(node.target, x)
            if not fits or x.dtype != wanted:
                reason = "its dtype is another" if fits else "its channels or its positions are not adjacent"
                out = self.steps.image(x.shape, wanted)
                given = given | {name: copied(self.steps, node, x, out, reason)}
        return given

    def _nothing(self, node: fx.Node) -> Any:
        """The values of a call that has no elements to compute."""
        results = node.meta["val"]
        if isinstance(results, Tensor):
            return self.steps.image(results.shape) if results.ndim > 2 else self.steps.keep(_dense(results))
        return [None if x is None else self.steps.keep(_dense(x)) for x in results]

    def _by_torch(self, node: fx.Node, target: Any, given: dict[str, Any], reason: str, name: str | None = None) -> Any:
        """Let torch compute it, unless it is a view of what is there."""
        name = name or _name(target)
        if target in _CONTIGUOUS and not given["self"].is_contiguous():
            dense = self.steps.keep(_dense(given["self"]))
            given = given | {"self": copied(self.steps, node, given["self"], dense, "it needs a contiguous input")}
        computed = by_torch.InMemoryOrder(target) if target in by_torch.IN_MEMORY_ORDER else target
        computed, given, dtype = dtypes.agree(computed, target, given, self.kernels.dtype)
        alike = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), given)
        result = without_data.call(
            computed, (), pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), alike)
        )
        single = isinstance(result, Tensor)
        parts = [result] if single else list(result)
        if all(self.steps.owns(part) for part in parts):
            return result
        readers = {0: node} if single else {user.args[1]: user for user in node.users}
        rows = ROWS.get(target, ())
        outs: list[Any] = []
        for i, part in enumerate(parts):
            part = part if dtype is None else part.to(dtype)
            if i not in readers:  # as the moments of a norm, whose sizes torch may not know
                outs.append(None)
            elif readers[i] in self.as_images:
                outs.append(self.steps.image(part.shape, part.dtype))
            else:
                in_order = i in rows or part.is_contiguous()
                outs.append(self.steps.keep(_dense(part) if in_order else without_data.empty_like(part)))
        self.steps.add(Step(node.name, name, by_torch.Computed.of(computed), (outs, given), reason))
        return outs[0] if single else outs


def _has_no_elements(node: fx.Node) -> bool:
    results = node.meta["val"]
    return not (results if isinstance(results, Tensor) else results[0]).numel()


def _name(target: Any) -> str:
    return str(target).removesuffix(".default")


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


def _dense(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, device="meta")
