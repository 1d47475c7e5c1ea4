"""The engine behind torch's own door: `torch.compile(network, backend="cmfast")`.

torch hands over a graph and, at each call, all tensors that the graph reads: activations and the network's weights
alike. The weights become the parameters of a module again, which an `Accelerator` runs: they are packed once, and
writes to them are noticed. Where the engine cannot serve a graph, torch runs it, and a warning says why, once.
"""

import copy
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..kernels.backends import BackendError
from .accelerator import Accelerator, check_dtype, products_of
from .capture import CaptureError

_log = logging.getLogger(__name__)

#: Networks, told apart by their weights, that a graph is kept ready for: equal blocks of a network share one graph.
_MOST_NETWORKS = 64


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return what evaluates a graph of torch.compile's: the engine where it can, for inference, else torch.

    Each size of the inputs has a program of its own, with `dynamic=True` too, and so has each value of an argument
    that is a number: timesteps are better given as tensors. Graphs that are called with gradients enabled for inputs or
    weights that require them are torch's, and so are those without weights.

    Args:
        graph: what torch has recorded.
        example_inputs: not read: shapes and values are those of each call.
        mode: there is none but "default".
        options: `dtype` (a torch.dtype or its name), `tune` and `cache`, as `cmfast.accelerate` takes them.

    Raises:
        ValueError: a mode, an unknown option, or a dtype that the device does not serve.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    weights = {i for i, node in enumerate(placeholders) if _is_weight(node)}
    device = _device(graph, placeholders)
    settings = _settings(mode, options, device)
    if not weights and not any(True for _ in graph.parameters()):
        _log.debug("a graph without weights is left to torch")
        return graph.forward
    reason = _refusal(graph, placeholders, device)
    if reason:
        _say(f"torch runs a graph of torch.compile's: {reason}")
        return graph.forward
    return _Compiled(graph, placeholders, weights, settings, device)


def _settings(mode: str | None, options: Mapping[str, Any] | None, device: torch.device) -> dict[str, Any]:
    if mode not in (None, "default"):
        raise ValueError(f'torch.compile(backend="cmfast") has no modes, got mode={mode!r}: see its options')
    found: dict[str, Any] = {"dtype": None, "tune": False, "cache": None}
    for name, value in (options or {}).items():
        if name not in found:
            raise ValueError(f'torch.compile(backend="cmfast"): options are {", ".join(found)}, got {name}={value!r}')
        found[name] = value
    if isinstance(found["dtype"], str):
        found["dtype"] = getattr(torch, found["dtype"], found["dtype"])
    check_dtype(found["dtype"], device)
    return found


def _is_weight(node: fx.Node) -> bool:
    """Whether a graph's input is a parameter, a buffer or another tensor that a module holds."""
    return isinstance(_example(node), nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _example(node: fx.Node) -> Any:
    """A node's value without data, as torch has traced it."""
    return node.meta.get("example_value", node.meta.get("val"))


def _device(graph: fx.GraphModule, placeholders: Sequence[fx.Node]) -> torch.device:
    """That of the first tensor of a graph that is not one number."""
    tensors = [*map(_example, placeholders), *graph.parameters()]
    return next((t.device for t in tensors if isinstance(t, Tensor) and t.ndim), torch.device("cpu"))


def _refusal(graph: fx.GraphModule, placeholders: Sequence[fx.Node], device: torch.device) -> str:
    """Why the engine does not take a graph; "" where nothing is known against it."""
    if device.type not in ("cpu", "cuda"):
        return f"the engine takes tensors on the CPU or on a GPU (CUDA or ROCm), and there are some on {device}"
    for node in placeholders:
        value = _example(node)
        if not isinstance(value, Tensor) or _is_number(node):
            continue
        if value.device != device and (value.ndim or value.device.type != "cpu"):
            return f"the engine takes tensors on one device, and there are some on {device} and {value.device}"
        if (value.dtype == torch.float64 and not _is_factor(node)) or value.is_complex():
            return f"the engine computes in float32, and {node.name} is {value.dtype}"
    within = any("_enter_autocast" in str(node.target) for node in graph.graph.nodes)
    if within or torch.is_autocast_enabled(device.type):
        return 'it is called under autocast: give options={"dtype": "bfloat16"} instead'
    return ""


def _is_number(node: fx.Node) -> bool:
    """Whether a graph's input is a tensor for the sake of a number of Python's, which the graph takes out of it."""
    value = _example(node)
    if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.ndim or not node.users:
        return False
    return all(user.op == "call_method" and user.target == "item" for user in node.users)


def _is_factor(node: fx.Node) -> bool:
    """Whether a graph's input is one number that nothing is computed of in its own dtype: a scalar of numpy's, say."""
    values = [_example(node), *map(_example, node.users)]
    return not values[0].ndim and all(isinstance(x, Tensor) and x.dtype != torch.float64 for x in values[1:])


@functools.cache
def _say(message: str) -> None:
    _log.warning(message)


class _Compiled:
    """Calls a graph of torch.compile's by the engine."""

    def __init__(
        self,
        graph: fx.GraphModule,
        placeholders: Sequence[fx.Node],
        weights: set[int],
        settings: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._graph = graph
        self._still = _without_moves(graph, device)
        self._settings = settings
        self._weights = weights
        self._numbers = {i for i, node in enumerate(placeholders) if _is_number(node)}
        self._strides = [_strides(_example(x)) if isinstance(x, fx.Node) else None for x in _outputs(graph)]
        self._gradients = any(
            node.target is torch._C._set_grad_enabled and node.args[0] is True for node in graph.graph.nodes
        )
        self._networks: OrderedDict[tuple[int, ...], Accelerator] = OrderedDict()
        self._lock = threading.Lock()
        self._dropped: set[tuple[int, ...]] = set()
        self._shared = False  # modules that share the graph share a weight as well
        self._refused = False

    def __call__(self, *given: Any) -> Any:
        if self._refused:
            return self._graph.forward(*given)
        if (self._gradients or torch.is_grad_enabled()) and _differentiable((*given, *self._graph.parameters())):
            _say(
                "torch runs a graph of torch.compile's: the engine serves inference, and gradients are enabled for "
                "weights or inputs that require them; call it under torch.inference_mode() or torch.no_grad()"
            )
            return self._graph.forward(*given)
        try:
            network, rest = self._network(given)
            outputs = network(*rest)
        except BackendError:  # it was asked for by name
            raise
        except Exception as error:  # torch has traced the graph, so that it is the engine that cannot run it
            self._refused = isinstance(error, CaptureError)  # others may be of this call alone
            _say(f"torch runs a graph of torch.compile's: {type(error).__name__}: {error}")
            return self._graph.forward(*given)
        return tuple(map(_laid_out, outputs, self._strides))

    def _network(self, given: Sequence[Any]) -> tuple[Accelerator, list[Any]]:
        """What runs the graph with the weights that are given, and the other inputs."""
        with self._lock:
            key = tuple(id(given[i]) for i in sorted(self._weights))
            if key not in self._networks:
                self._shared |= key in self._dropped  # what was taken for replaced is there again
                key = key if self._shared else self._forget(given, key)
                weights = {i: given[i] for i in sorted(self._weights)}
                network = _Network(self._still, weights, self._numbers).eval()
                products = products_of(list(network.parameters()), self._settings["dtype"])
                tune, cache = self._settings["tune"], self._settings["cache"]
                self._networks[key] = Accelerator(network, products, tune=tune, cache=cache, whole=True)
                while len(self._networks) > _MOST_NETWORKS:
                    self._networks.popitem(last=False)
            self._networks.move_to_end(key)
            rest = [x for i, x in enumerate(given) if i not in self._weights]
            numbers = [i in self._numbers for i in range(len(given)) if i not in self._weights]
            return self._networks[key], [float(x) if n else x for x, n in zip(rest, numbers, strict=True)]

    def _forget(self, given: Sequence[Any], key: tuple[int, ...]) -> tuple[int, ...]:
        """Drop a network some of whose weights were replaced; the key of the network to make.

        It is another one if it shares no weight with those that there are: modules of the same type share one graph.
        Tensors other than parameters that were replaced are inputs from now on, since they may be so at every call.
        """
        places = sorted(self._weights)
        for old in list(self._networks):
            replaced = {place for place, a, b in zip(places, old, key, strict=True) if a != b}
            if len(replaced) == len(places):
                continue
            del self._networks[old]
            self._dropped = {*list(self._dropped)[-_MOST_NETWORKS:], old}
            if not any(isinstance(given[i], nn.Parameter) for i in replaced):
                self._weights = self._weights - replaced
                self._networks.clear()
                return tuple(id(given[i]) for i in sorted(self._weights))
        return key


class _Network(nn.Module):
    """A graph as a module: it holds the weights and takes the other inputs in order, numbers as numbers."""

    def __init__(self, graph: fx.GraphModule, weights: Mapping[int, Tensor], numbers: set[int]) -> None:
        super().__init__()
        self.graph = graph
        self._places, self._numbers = tuple(weights), frozenset(numbers)
        for i, tensor in weights.items():
            register = self.register_parameter if isinstance(tensor, nn.Parameter) else self.register_buffer
            register(_name(i), tensor)  # type: ignore[arg-type]

    def forward(self, *given: Any) -> Any:
        return self.graph.forward(*self._arguments(given))

    def _arguments(self, given: Sequence[Any]) -> Iterator[Any]:
        rest = iter(given)
        for i in range(len(given) + len(self._places)):
            if i in self._places:
                yield getattr(self, _name(i))
            else:
                value = next(rest)
                yield torch.tensor(value, dtype=torch.float64) if i in self._numbers else value


def _without_moves(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a graph, all of which is on a device, in which no tensor is moved there: without data, none can be."""
    found = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in found.graph.find_nodes(op="call_method", target="to"):
        node.args = tuple(x for x in node.args if not _names(x, device))
        node.kwargs = {name: x for name, x in node.kwargs.items() if not _names(x, device)}
    for node in found.graph.nodes:
        if node.op == "call_method" and node.target in ("to", device.type) and len(node.args) == 1 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            found.graph.erase_node(node)
    found.recompile()
    return found


def _names(value: Any, device: torch.device) -> bool:
    """Whether a value is a device, or the name of one, that is this one; where it says no number, of this type."""
    if isinstance(value, str):
        value = torch.device(value)
    return isinstance(value, torch.device) and value.type == device.type and value.index in (None, device.index)


def _name(place: int) -> str:
    return f"input_{place}"


def _differentiable(values: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in values)


def _outputs(graph: fx.GraphModule) -> list[Any]:
    (outputs,) = graph.graph.output_node().args
    assert isinstance(outputs, tuple | list)
    return list(outputs)


def _strides(value: Any) -> tuple[int, ...] | None:
    """Of an output, where they are known and no elements share their memory."""
    if not isinstance(value, Tensor) or not all(type(s) is int and s > 0 for s in value.stride()):
        return None
    return value.stride()


def _laid_out(output: Any, strides: tuple[int, ...] | None) -> Any:
    """An output whose dimensions are in memory in the order in which torch has them."""
    if strides is None or not isinstance(output, Tensor):
        return output
    order = sorted(range(output.ndim), key=lambda i: -strides[i])
    inverse = sorted(range(output.ndim), key=order.__getitem__)
    return output.permute(order).contiguous().permute(inverse)
