"""The graph of a network, recorded while it runs once on tensors without data.

Every operator that reaches the dispatcher is recorded; Python around them has run by then, so a network whose course
depends on the values of tensors cannot be captured. It takes a twentieth of torch.export's time: start-up counts.
"""

import hashlib
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import Graph


class CaptureError(RuntimeError):
    """A network cannot be captured; the message says what stands in the way."""


def capture(module: nn.Module, inputs: Sequence[Tensor | None]) -> Graph:
    """Record the operators of `module(*inputs)`, of which only shapes and dtypes are read.

    Floating-point parameters, buffers and inputs are taken as float32, whatever they are.

    Raises:
        CaptureError: the network reads the values of its tensors, writes to one in place, or draws random numbers.
        Exception: what the network itself raises for inputs of these shapes.
    """
    recorder = _Recorder()
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    replaced = {name: recorder.attribute(name, _wide(tensor.detach())) for name, tensor in named.items()}
    given = [None if x is None else recorder.placeholder(f"input_{i}", _wide(x)) for i, x in enumerate(inputs)]
    try:
        with torch.no_grad(), recorder:
            result = torch.func.functional_call(module, replaced, tuple(given))
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, CaptureError) or not _WITHOUT_DATA.search(str(error)):
            raise
        raise CaptureError(f"{type(module).__name__} reads the values of tensors while it runs: {error}") from error
    recorder.graph.output(pytree.tree_map_only(Tensor, recorder.node_of, result))
    recorder.graph.eliminate_dead_code()
    return Graph(recorder.graph, recorder.tensors)


#: What torch says where the values of a tensor without data are asked for and no operator is called.
_WITHOUT_DATA = re.compile(r"Cannot copy out of meta tensor|cannot be called on meta tensors")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float32 else tensor


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.nodes: dict[int, fx.Node] = {}  # by the identity of a tensor without data
        self.alive: list[Tensor] = []  # so that no other tensor takes such an identity

    def placeholder(self, name: str, like: Tensor) -> Tensor:
        return self._keep(self.graph.placeholder(name), torch.empty_like(like, device="meta"))

    def attribute(self, name: str, tensor: Tensor) -> Tensor:
        self.tensors[name] = tensor
        return self._keep(self.graph.create_node("get_attr", name), torch.empty_like(tensor, device="meta"))

    def node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.nodes:
            if tensor.is_meta:
                raise CaptureError("a tensor was made outside the network, without data")
            # By its content, which is a part of what is computed of it.
            bytes_ = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
            content = hashlib.sha256(bytes_).hexdigest()[:16]
            self.attribute(f"constant {list(tensor.shape)} {tensor.dtype} {content}", tensor.detach())
            self.nodes[id(tensor)] = self.nodes[id(self.alive[-1])]
            self.alive.append(tensor)
        return self.nodes[id(tensor)]

    def _keep(self, node: fx.Node, tensor: Tensor) -> Tensor:
        node.meta["val"] = tensor
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_random(func, args, kwargs or {}):
            raise CaptureError(f"the network draws random numbers, with {func}: give it the noise as an input")
        if func._schema.is_mutable:
            raise CaptureError(f"the network writes to a tensor in place, with {func}")
        recorded = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs or {}))
        args, kwargs = fx.node.map_arg(recorded, lambda node: node.meta["val"])
        try:
            result = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            raise CaptureError(f"the network reads the values of tensors, with {func}: {error}") from error
        on_cpu = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in recorded[1].items()}
        node = self.graph.call_function(func, recorded[0], on_cpu)
        node.meta["val"] = result
        if isinstance(result, Tensor):
            return self._keep(node, result)
        for i, part in enumerate(result):
            item = self.graph.call_function(operator.getitem, (node, i))
            self._keep(item, part)
        return result


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator's result is another at every call; those of dropout are not where its probability is 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return (defaults | given).get("dropout_p", 1.0) != 0.0
