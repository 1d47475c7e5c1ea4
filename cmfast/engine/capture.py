"""The graph of a network, recorded while it runs once on tensors without data.

Every operator that reaches the dispatcher is recorded; Python around them has run by then, so a network whose course
depends on the values of tensors cannot be captured. It takes a twentieth of torch.export's time: start-up counts.
"""

import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import without_data
from .graph import Graph
from .layers import Layers
from .patterns import attention, circular_padding, linear
from .structure import Structure, flatten


class CaptureError(RuntimeError):
    """A network cannot be captured; the message says what stands in the way."""


def capture(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Record the operators of `module(*args, **kwargs)`; of tensors only shapes and dtypes are read.

    Floating-point parameters, buffers and inputs are taken as float32, whatever they are.

    Raises:
        CaptureError: the network reads the values of its tensors, writes to one in place, draws random numbers, or
            returns something that is not made of tensors, numbers, tuples, lists, dicts and dataclasses.
        Exception: what the network itself raises for inputs of these shapes.
    """
    layers = Layers({m: name for name, m in module.named_modules()})
    recorder = _Recorder(layers)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    replaced = {name: recorder.attribute(name, _wide(tensor.detach())) for name, tensor in named.items()}
    tensors, structure = flatten((tuple(args), dict(kwargs or {})))
    given = [recorder.placeholder(f"input_{i}", _wide(x)) for i, x in enumerate(tensors)]
    returned: list[Structure] = []

    def call(replaced: dict[str, Tensor], given: list[Tensor]) -> list[Tensor]:
        result = torch.func.functional_call(module, replaced, *structure.build(given))
        try:
            outputs, found = flatten(result)
        except TypeError as error:
            raise CaptureError(f"{type(module).__name__} returns a value of an unknown type: {error}") from error
        returned.append(found)
        return outputs

    try:
        # Functional: what is written in place within the network becomes another value.
        with torch.no_grad(), layers.followed(), recorder, _Functions():
            outputs = torch.func.functionalize(call)(replaced, given)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, CaptureError) or not _WITHOUT_DATA.search(str(error)):
            raise
        raise CaptureError(f"{type(module).__name__} reads the values of tensors while it runs: {error}") from error
    recorder.graph.output([recorder.node_of(t) for t in outputs])
    recorder.graph.eliminate_dead_code()
    return Graph(recorder.graph, recorder.tensors, returned[0])


def output_dtypes(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], computed: Sequence[torch.dtype]
) -> list[torch.dtype]:
    """The dtypes of the tensors that `module(*args, **kwargs)` returns, of which `computed` are those of its graph.

    They differ where parameters or inputs are not float32. Inputs that the network would not take in their dtypes, but
    the graph does, give their own dtype (the first one's) to the floating-point outputs.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors, structure = flatten((tuple(args), dict(kwargs)))
    floating = [t.dtype for t in (*tensors, *named.values()) if t.is_floating_point()]
    if all(dtype == torch.float32 for dtype in floating):
        return list(computed)
    empty = {name: without_data.like(t) for name, t in named.items()}
    given = structure.build([without_data.like(t) for t in tensors])
    try:
        with _WithoutData():
            return [t.dtype for t in flatten(torch.func.functional_call(module, empty, *given))[0]]
    except (NotImplementedError, RuntimeError):
        first = next(dtype for dtype in floating)
        return [first if dtype.is_floating_point else dtype for dtype in computed]


#: What torch says where the values of a tensor without data are asked for and no operator is called.
_WITHOUT_DATA = re.compile(
    r"Cannot copy out of meta tensor|cannot be called on meta tensors|unallocated storage|doesn't have storage"
)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float32 else tensor


class _Functions(TorchFunctionMode):
    """What is seen of a network's calls before torch takes them apart.

    Tensors of Python's numbers are made with their data, also where a network asks for them on its inputs' device.
    Attention, linear layers of tokens and circular padding are recognised.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            like, *args = args
            func, kwargs = torch.tensor, {"dtype": like.dtype, "device": like.device, **kwargs}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
            if torch.device(kwargs.get("device") or "cpu").type == "meta" and not isinstance(data, Tensor):
                kwargs["device"] = "cpu"
        for pattern in (attention, linear, circular_padding):
            found = pattern.recognise(func, args, kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


class _WithoutData(TorchDispatchMode):
    """Operators run on tensors without data."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, to keep it from what is within this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return without_data.call(func, args, kwargs or {})


class _Recorder(_WithoutData):
    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.nodes: dict[int, fx.Node] = {}  # by the identity of a tensor without data
        self.alive: list[Tensor] = []  # so that no other tensor takes such an identity
        self.known: dict[fx.Node, Tensor] = {}  # values that no input or parameter takes part in: their data is there

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
            known = tensor.detach().cpu()  # as all that is known
            bytes_ = known.contiguous().flatten().view(torch.uint8).numpy().data
            name = f"constant {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(bytes_).hexdigest()[:16]}"
            self.tensors[name] = known
            node = self.graph.create_node("get_attr", name)
            self._keep(node, known)
            self.nodes[id(tensor)] = node
            self.alive.append(tensor)
        return self.nodes[id(tensor)]

    def _keep(self, node: fx.Node, tensor: Tensor) -> Tensor:
        node.meta["val"] = tensor if tensor.is_meta else without_data.like(tensor)
        if not tensor.is_meta:
            self.known[node] = tensor
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_random(func, args, kwargs or {}):
            raise CaptureError(f"the network draws random numbers, with {func}: give it the noise as an input")
        if func._schema.is_mutable:
            raise CaptureError(
                f"the network writes in place to what it is given, a parameter or a constant, with {func}"
            )
        func, args, kwargs = _of_numbers(func, args, kwargs or {})
        recorded = pytree.tree_map_only(Tensor, self.node_of, (args, kwargs))
        given: list[fx.Node] = []
        fx.node.map_arg(recorded, given.append)
        known = all(node in self.known for node in given)
        args, kwargs = fx.node.map_arg(recorded, self.known.__getitem__ if known else lambda node: node.meta["val"])
        if known:  # on the CPU, whatever device is asked for but that of an input
            kwargs = {k: torch.device("cpu") if _is_other(v) else v for k, v in kwargs.items()}
        else:  # what is asked for on the device of a value that is known
            kwargs = {k: torch.device("meta") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        try:
            result = without_data.call(func, args, kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            raise CaptureError(f"the network reads the values of tensors, with {func}: {error}") from error
        if not isinstance(result, Tensor | tuple | list):  # a number, of what is known
            return result
        on_cpu = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in recorded[1].items()}
        node = self.graph.call_function(func, recorded[0], on_cpu)
        node.meta["layer"] = self.layers.current
        if isinstance(result, Tensor):
            return self._keep(node, result)
        node.meta["val"] = [part if part.is_meta else without_data.like(part) for part in result]
        for i, part in enumerate(result):
            item = self.graph.call_function(operator.getitem, (node, i))
            item.meta["layer"] = self.layers.current
            self._keep(item, part)
        return result


#: Operators that read nothing of their first argument but its shape, dtype and device: the value that they fill with.
_FILLED = {
    torch.ops.aten.zeros_like.default: 0,
    torch.ops.aten.ones_like.default: 1,
    torch.ops.aten.full_like.default: None,
    torch.ops.aten.new_zeros.default: 0,
    torch.ops.aten.new_ones.default: 1,
    torch.ops.aten.new_full.default: None,
}


def _of_numbers(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call of such an operator as one of `full`, whose value no tensor takes part in; any other call as it is."""
    if func not in _FILLED:
        return func, args, kwargs
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    like = given["self"]
    filled = given.get("fill_value") if _FILLED[func] is None else _FILLED[func]
    dtype = given.get("dtype") or like.dtype
    return torch.ops.aten.full.default, (list(given.get("size", like.shape)), filled), {"dtype": dtype, "device": "cpu"}


def _is_other(x: Any) -> bool:
    """Whether it is a device that is neither the CPU nor that of tensors without data."""
    return isinstance(x, torch.device) and x.type not in ("cpu", "meta")


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator's result is another at every call; those of dropout are not where its probability is 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return (defaults | given).get("dropout_p", 1.0) != 0.0
