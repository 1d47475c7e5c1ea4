"""A network as the passes see it: a torch.fx graph of operators, and the tensors that it reads by name."""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels
from .structure import Structure

CONV = torch.ops.cmfast.conv2d.default
VIEW = torch.ops.aten.view.default
PERMUTE = torch.ops.aten.permute.default
#: Operators of strides in memory.
STRIDED = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.as_strided_copy.default,
    torch.ops.aten.as_strided_scatter.default,
)


@dataclasses.dataclass
class Graph:
    """A graph whose nodes are placeholders, get_attr, calls of operators, and one output.

    Attributes:
        nodes: the torch.fx graph. meta["val"] of a node is its value as a tensor without data (or several of them), and
            meta["layer"] of a call the dotted name of the network's module that makes it: see `layer`.
        tensors: what get_attr nodes read: parameters, buffers and constants, and what passes made of them.
        structure: of what the network returns, whose tensors are the output's in order.
    """

    nodes: fx.Graph
    tensors: dict[str, Tensor]
    structure: Structure

    def calls(self, *targets: Callable) -> Iterator[fx.Node]:
        """The calls of these operators, in order; nodes may be replaced meanwhile."""
        yield from [n for n in self.nodes.nodes if n.op == "call_function" and n.target in targets]

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor that a get_attr node reads; None for any other value."""
        return self.tensors[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def attribute(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """A node that reads `tensor`, kept under `name`."""
        self.tensors[name] = tensor
        with self.nodes.inserting_before(before):
            node = self.nodes.create_node("get_attr", name)
        node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return node

    def call(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator, placed before another node, whose layer it has; its meta value is computed.

        A view of a view is taken of what that is of; one that would change nothing is what it is of.
        """
        if target is VIEW:
            x, sizes = args
            while x.target is VIEW:
                x = x.args[0]
            if shape(x) == list(sizes):
                return x
            args = x, sizes
        with self.nodes.inserting_before(before):
            node = self.nodes.call_function(target, args, kwargs)
        node.meta["val"] = _execute(target)(*fx.node.map_arg(args, value), **fx.node.map_arg(kwargs, value))
        node.meta["layer"] = layer(before)
        return node

    def like(self, node: fx.Node, target: Callable, *args: Any) -> fx.Node:
        """Another call with the value of `node`, placed before it."""
        with self.nodes.inserting_before(node):
            call = self.nodes.call_function(target, args)
        call.meta |= {"val": value(node), "layer": layer(node)}
        return call

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """Output `index` of a call that has several, placed right after it; the same node however often asked for."""
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == index:
                return user
        with self.nodes.inserting_after(node):
            item = self.nodes.call_function(operator.getitem, (node, index))
        item.meta |= {"val": node.meta["val"][index], "layer": layer(node)}
        return item

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all users of `old` take `new`, and remove what is then not used."""
        old.replace_all_uses_with(new)
        self.erase(old)

    @property
    def device(self) -> torch.device:
        """Where its tensors are, those that have data."""
        return next((t.device for t in self.tensors.values() if not t.is_meta), torch.device("cpu"))

    def move(self, device: torch.device) -> None:
        """Put its tensors on a device, and let its calls make theirs there."""
        self.tensors = {name: t if t.is_meta else t.to(device) for name, t in self.tensors.items()}
        for node in self.nodes.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is None or not any(a.name == "device" for a in schema.arguments):
                continue
            if node.kwargs.get("device") is not None or not node.all_input_nodes:
                node.kwargs = node.kwargs | {"device": device}

    def erase(self, node: fx.Node) -> None:
        """Remove a node without users, and what only it used."""
        if node.users or node.op in ("placeholder", "output"):
            return
        inputs = node.all_input_nodes
        self.nodes.erase_node(node)
        for given in inputs:
            self.erase(given)

    def run(self, *inputs: Tensor | None) -> Any:
        """Execute the graph node by node in plain PyTorch: what every pass must leave as it was."""
        values: dict[fx.Node, Any] = {}
        given = iter([x for x in inputs if x is not None])
        for node in self.nodes.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self.tensors[str(node.target)]
            elif node.op == "output":
                return self.structure.build(fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                with kernels.use_backend("reference"):
                    values[node] = _execute(node.target)(*args, **kwargs)
        raise ValueError("a graph ends in its output")


def _execute(target: Any) -> Callable[..., Any]:
    """What computes a call: a view is of any strides, by a copy where it must be."""
    return torch.reshape if target is VIEW else target


def value(node: fx.Node) -> Any:
    """A node's value as a tensor without data."""
    return node.meta["val"]


def layer(node: fx.Node) -> str:
    """The dotted name of the network's module whose operator a call is; "" for the network itself.

    A call that does what several operators did is of the module of the main one: the convolution, the normalisation.
    One that serves several modules is of the innermost module that they are all in.
    """
    return str(node.meta.get("layer", ""))


def dtype(node: Any) -> torch.dtype | None:
    """The dtype of a node's value; None of what is no tensor."""
    found = value(node) if isinstance(node, fx.Node) else None
    return found.dtype if isinstance(found, Tensor) else None


def shape(node: Any) -> list[int]:
    """The shape of a node's value."""
    return list(value(node).shape)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by their names in the operator's schema, defaults among them."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found |= dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return found | dict(node.kwargs)


def change(node: fx.Node, **changes: Any) -> None:
    """Set arguments of a call, by their names."""
    node.args, node.kwargs = (), arguments(node) | changes


def convolution_of(node: Any) -> fx.Node | None:
    """The conv2d whose output the node is."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        producer = node.args[0]
        if isinstance(producer, fx.Node) and producer.target is CONV:
            return producer
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one; None where there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def origin(node: fx.Node, root: fx.Node | None = None) -> tuple[fx.Node, Tensor | None]:
    """What a node is a view of, by views and permutations, and how it would lie if that were contiguous.

    The second is a tensor without data, whose strides tell; None where it would have to be copied. The search ends at
    `root`, where one is given.
    """
    chain: list[fx.Node] = []
    while node is not root and node.target in (VIEW, PERMUTE):
        chain.append(node)
        node = operands(node)[0]
    lay = torch.empty(shape(node), device="meta")
    try:
        for call in reversed(chain):
            lay = call.target(lay, operands(call)[1])  # type: ignore[operator]
    except RuntimeError:
        return node, None
    return node, lay


def operands(node: Any) -> tuple[Any, ...]:
    """The arguments of a call that were given by their places."""
    return tuple(node.args)


def storage(tensor: Tensor) -> int:
    """What tells a tensor's memory from others': views share it, also of tensors without data."""
    return tensor.untyped_storage()._cdata
