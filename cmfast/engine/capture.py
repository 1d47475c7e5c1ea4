"""The graph of a network, recorded while it runs once on tensors without data.

Every operator that reaches the dispatcher is recorded; Python around them has run by then, so a network whose course
depends on the values of tensors cannot be captured. It takes a twentieth of torch.export's time: start-up counts.
"""

import hashlib
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import without_data
from .graph import Graph, storage
from .layers import Layers
from .patterns import attention, circular_padding, linear
from .structure import Structure, flatten

_aten = torch.ops.aten


class CaptureError(RuntimeError):
    """A network cannot be captured; the message says what stands in the way."""


class SideEffectError(CaptureError):
    """A forward does more than return its outputs: it sets attributes, replaces buffers, writes to a list of its call.

    It may do so at the first call alone, as with what is computed once. Its own forward gives what it should.
    """


def capture(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Record the operators of `module(*args, **kwargs)`; of tensors only shapes and dtypes are read.

    Floating-point parameters, buffers and inputs are taken as float32, whatever they are.

    Raises:
        CaptureError: the network reads the values of its tensors, writes to one in place, draws random numbers, or
            returns something that is not made of tensors, numbers, tuples, lists, dicts and dataclasses.
        SideEffectError: it puts another tensor in the place of a buffer, or changes a list or dict that it is given.
        Exception: what the network itself raises for inputs of these shapes.
    """
    layers = Layers({m: name for name, m in module.named_modules()})
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors, structure = flatten((tuple(args), dict(kwargs or {})))
    recorder = _Recorder(layers, {t.dtype for t in (*named.values(), *tensors) if _is_half(t)})
    replaced = {name: recorder.attribute(name, _wide(tensor.detach())) for name, tensor in named.items()}
    given = [recorder.placeholder(f"input_{i}", _wide(x)) for i, x in enumerate(tensors)]
    returned: list[Structure] = []
    placed = _placed([*tensors, *named.values()])

    def call(replaced: dict[str, Tensor], given: list[Tensor]) -> list[Tensor]:
        arguments = structure.build(given)
        result = _called(module, replaced, arguments)
        _refuse_writes_to(arguments, given, structure)
        try:
            outputs, found = flatten(result)
        except TypeError as error:
            raise CaptureError(f"{type(module).__name__} returns a value of an unknown type: {error}") from error
        returned.append(found)
        return outputs

    try:
        # Functional: what is written in place within the network becomes another value.
        with torch.no_grad(), layers.followed(), _unfused_attention(), recorder, _Functions(placed):
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
        with _WithoutData(), _Places(_placed([*tensors, *named.values()])):
            return [t.dtype for t in flatten(torch.func.functional_call(module, empty, *given))[0]]
    except (NotImplementedError, RuntimeError):
        first = next(dtype for dtype in floating)
        return [first if dtype.is_floating_point else dtype for dtype in computed]


class _Called(nn.Module):
    """A network, called by nn.Module's __call__: what its class has in the place of that runs around the engine."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        result = nn.Module.__call__(self.network, *args, **kwargs)
        after = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        for name in before | after:
            if before.get(name) is not after.get(name):
                raise SideEffectError(f"its forward puts another tensor in the place of {name}")
        return result


def _called(module: nn.Module, replaced: Mapping[str, Tensor], arguments: tuple[Any, Any]) -> Any:
    args, kwargs = arguments
    within = {f"network.{name}": tensor for name, tensor in replaced.items()}
    return torch.func.functional_call(_Called(module), within, args, kwargs)


def _refuse_writes_to(arguments: Any, given: Sequence[Tensor], structure: Structure) -> None:
    """Raise SideEffectError where the lists and dicts of a call's arguments are not what they were."""
    try:
        tensors, found = flatten(arguments)
        same = found == structure and all(a is b for a, b in zip(tensors, given, strict=True))
    except TypeError:
        same = False
    if not same:
        raise SideEffectError("the network writes to a list or a dict that it is given")


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Within the block nn.MultiheadAttention and what is made of it are products and a softmax, not one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


#: What torch says where the values of a tensor without data are asked for and no operator is called.
_WITHOUT_DATA = re.compile(
    r"Cannot copy out of meta tensor|cannot be called on meta tensors|unallocated storage|doesn't have storage"
)


def _is_dtype(x: Any) -> bool:
    return isinstance(x, torch.dtype)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float32 else tensor


def _indices(index: Any) -> Any:
    """An index with tensors for its lists of numbers, which torch would make where they have no data."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    is_list = isinstance(index, list) and all(type(i) is int for i in index)
    return torch.tensor(index, device="cpu") if is_list and index else index


def _placed(tensors: Sequence[Tensor]) -> Tensor | None:
    """One of them that has data, and with it the device that a network runs on."""
    return next((t for t in tensors if not t.is_meta), None)


#: How a network asks where a tensor is.
_WHERE = (
    *(torch.Tensor.device.__get__, torch.Tensor.get_device),
    *(getattr(torch.Tensor, f"is_{name}").__get__ for name in ("cpu", "cuda", "meta", "mps", "xpu")),
)


class _Places(TorchFunctionMode):
    """To the network a tensor without data is where its inputs are: it may take another course on another device."""

    def __init__(self, placed: Tensor | None) -> None:
        super().__init__()
        self.placed = placed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHERE and self.placed is not None:
            return func(self.placed)
        return func(*args, **(kwargs or {}))


class _Functions(_Places):
    """What is seen of a network's calls before torch takes them apart.

    Tensors of Python's numbers are made with their data, also where a network asks for them on its inputs' device.
    Attention, linear layers of tokens and circular padding are recognised.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            like, *args = args
            func, kwargs = torch.tensor, {"dtype": like.dtype, "device": like.device, **kwargs}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
            if kwargs.get("device") is not None and not isinstance(data, Tensor):
                kwargs["device"] = "cpu"
        for pattern in (attention, linear, circular_padding):
            found = pattern.recognise(func, args, kwargs)
            if found is not None:
                return found
        return super().__torch_function__(func, types, args, kwargs)


class _WithoutData(TorchDispatchMode):
    """Operators run on tensors without data."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, to keep it from what is within this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return without_data.call(func, args, kwargs or {})


class _Recorder(_WithoutData):
    def __init__(self, layers: Layers, narrow: Collection[torch.dtype]) -> None:
        """`narrow` are dtypes in whose place there is float32: what the network makes of them is float32 too."""
        super().__init__()
        self.layers, self.narrow = layers, narrow
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.nodes: dict[int, fx.Node] = {}  # by the identity of a tensor without data
        self.alive: list[Tensor] = []  # so that no other tensor takes such an identity
        self.known: dict[fx.Node, Tensor] = {}  # values that no input or parameter takes part in: their data is there

    def placeholder(self, name: str, like: Tensor) -> Tensor:
        return self._keep(self.graph.placeholder(name), without_data.empty_like(like))

    def attribute(self, name: str, tensor: Tensor) -> Tensor:
        self.tensors[name] = tensor
        return self._keep(self.graph.create_node("get_attr", name), without_data.empty_like(tensor))

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
            return self._in_place(func, args, kwargs or {})
        if func is _aten.native_batch_norm.default and not args[5]:
            return self._batch_norm(*args)
        func = _LAZY.get(func, func)
        func, args, kwargs = _of_numbers(func, _each_dimension(func, args), kwargs or {})
        kwargs = {k: torch.float32 if _is_dtype(v) and v in self.narrow else v for k, v in kwargs.items()}
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

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator writes in place to a value of its own, which torch's composite operators do."""
        name = func._schema.name.removeprefix("aten::")
        plain = getattr(getattr(_aten, name.removesuffix("_"), None), func._overloadname, None)
        to = args[0]
        node = self.nodes.get(id(to)) if name.endswith("_") else None
        if plain is None or node is None or node.op != "call_function" or not self._has_its_own_memory(to):
            raise CaptureError(
                "the network writes in place to what it is given, a parameter, a constant, or a tensor that shares its "
                f"memory with another, with {func}"
            )
        with self:
            result = plain(*args, **kwargs)
            result = result if result.dtype == to.dtype else result.to(to.dtype)
        self.nodes[id(to)] = self.nodes[id(result)]
        return to

    def _has_its_own_memory(self, tensor: Tensor) -> bool:
        memory = storage(tensor)
        return not any(t is not tensor and storage(t) == memory for t in self.alive)

    def _batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With known moments it is a multiplication and an addition, which a convolution before it may have."""
        with self:
            scale = torch.rsqrt(variance + eps)
            scale = scale if weight is None else scale * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            across = (-1, *[1] * (x.ndim - 2))
            result = x * scale.view(across) + shift.view(across)
            return result, x.new_empty(0), x.new_empty(0)


#: Views of other values than are in memory, which nothing here can be: what is computed in their place.
_LAZY = {_aten._conj.default: _aten.conj_physical.default, _aten._neg_view.default: _aten.neg.default}


def _each_dimension(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A convolution's arguments with a number for each dimension, where there is one for all."""
    if func is not _aten.convolution.default:
        return args
    dims = args[0].ndim - 2
    return tuple(list(x) * dims if isinstance(x, list | tuple) and len(x) == 1 else x for x in args)


#: Operators that read nothing of their first argument but its shape, dtype and device: the value that they fill with.
_FILLED = {
    _aten.zeros_like.default: 0,
    _aten.ones_like.default: 1,
    _aten.full_like.default: None,
    _aten.new_zeros.default: 0,
    _aten.new_ones.default: 1,
    _aten.new_full.default: None,
}


def _of_numbers(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call of such an operator as one of `full`, whose value no tensor takes part in; any other call as it is."""
    if func not in _FILLED:
        return func, args, kwargs
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    like = given["self"]
    filled = given.get("fill_value") if _FILLED[func] is None else _FILLED[func]
    dtype = given.get("dtype") or like.dtype
    return _aten.full.default, (list(given.get("size", like.shape)), filled), {"dtype": dtype, "device": "cpu"}


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
