"""A network that is run by the engine."""

import copy
import dataclasses
import logging
import os
import pickle
import random
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize

from ..kernels.backends import BackendError, chosen
from ..kernels.transforms import forward_mode, transformed
from ..modes import in_eval_mode
from . import trace
from .capture import CaptureError, SideEffectError, capture, output_dtypes
from .cpu import CpuTarget
from .graph import Graph, storage, value
from .held import alike, held_by
from .parts import Parts
from .passes import PASSES
from .structure import Structure, flatten
from .target import Executable, Target
from .turns import Turns
from .watch import Watch

#: Calls, by the shapes of their tensors and all that is no tensor, that are kept ready; each has memory for its values.
_MOST_PROGRAMS = 8
#: Calls that are remembered because the network cannot be captured for them.
_MOST_REFUSALS = 64
#: Calls in a row that found the network changed, which are worth a warning.
_OFTEN = 4
_log = logging.getLogger(__name__)
#: A capture puts other parameters into modules that several accelerated networks may share.
turns = Turns()
_thread = threading.local()


@dataclasses.dataclass
class _Program:
    """What evaluates one kind of call, the structure of its outputs, and their dtypes by those of the inputs."""

    target: Target
    executable: Executable
    structure: Structure
    dtypes: dict[tuple[torch.dtype, ...], list[torch.dtype]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Made:
    """What was made of the network as it is."""

    target: Target
    watch: Watch | None
    programs: OrderedDict[Any, _Program] = dataclasses.field(default_factory=OrderedDict)


class _RaisedError(CaptureError):
    """What was raised while a network was captured: its own error, or one of being captured. Its own forward tells."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


class Accelerator:
    """Calls a network by fused kernels on the device of its parameters; for inference only.

    The network is captured, made faster and compiled to a program when a call meets shapes, or arguments that are no
    tensors, for the first time. It keeps its parameters; whatever of it changes, it is captured anew. For arguments for
    which it cannot be captured, its own forward runs, in which its parts are accelerated: see `parts.Parts`.

    Attributes:
        module: the network.
        products: dtype of the operands of products; on a GPU, and of bfloat16 on a processor with AMX, also of images
            between layers. All else is float32.
    """

    def __init__(
        self,
        module: nn.Module,
        products: torch.dtype,
        *,
        tune: bool = False,
        cache: str | Path | None = None,
        keep_weights: bool = True,
        graphs: bool = True,
        backend: str | None = None,
        passes: Sequence[str] | None = None,
        whole: bool = False,
    ) -> None:
        """Take a network; see `cmfast.accelerate` for the other arguments.

        `passes` are those of `passes.PASSES` and the target's to run, by default all. A `whole` network is not run by
        its parts, but raises CaptureError; it does so too where what it returns shares memory with an input or among
        itself, since that may be written to by what called it.
        """
        self.module = module
        self.products = products
        self.tune = tune
        self.cache = None if cache is None else Path(cache)
        self.keep_weights = keep_weights
        self.graphs = graphs
        self.backend = backend
        self.passes = None if passes is None else tuple(passes)
        self.whole = whole
        self._lock = threading.RLock()
        with turns.beside():
            self._made = self._start()
        if backend is not None:
            self._backend()
        self._parts = Parts(module, self._accelerate_part)
        self._refused: OrderedDict[Any, tuple[type[CaptureError], str]] = OrderedDict()
        self._anew = 0  # calls in a row before which the network had changed
        self._with_side_effects: set[Any] = set()  # calls that were not captured for these, once

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the network, as its own forward does: the same arguments, the same structure of outputs.

        Args:
            args: tensors on the device of the parameters, None, numbers, strings, and tuples, lists, dicts and
                dataclasses of them.
            kwargs: the same by name.

        Returns:
            What the network returns, in its dtypes and without a gradient.

        Raises:
            RuntimeError: the network is in training mode, an input requires a gradient, or a module has hooks.
            ValueError: tensors on another device, but for those of no dimensions, which may be on the CPU; or what the
                network itself says of inputs that do not fit.
            CaptureError: the network cannot be captured for these arguments, and has no parts that could be.
            BackendError: a backend that was asked for by name cannot serve it.
        """
        if self.module.training:
            raise RuntimeError("an accelerated network serves inference: call eval(), or train the network itself")
        _refuse_global_hooks()
        with _autocast_off():
            return self._evaluate(args, kwargs)

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._as_a_whole(args, kwargs)
        except CaptureError as error:
            as_it_is = isinstance(error, SideEffectError) and not self.whole and self.keep_weights
            if not self.has_parts and not as_it_is:
                if isinstance(error, _RaisedError) and self.keep_weights:  # its own error, or one of being captured
                    with turns.beside(), torch.no_grad(), in_eval_mode(self.module):
                        _without_hooks(self.module)(*args, **kwargs)
                    raise CaptureError(str(error)) from None
                raise (error.error if isinstance(error, _RaisedError) else error) from None
            reason = str(error)
        try:
            with turns.beside(), torch.no_grad(), in_eval_mode(self.module):
                return self._parts(reason, args, kwargs)
        except Exception:  # the network's own: without its reason, such as an attribute not yet set, it may be captured
            with self._lock:
                self._refused.clear()
            raise

    @property
    def left(self) -> dict[str, str]:
        """Why modules were not captured, and torch runs their forward, by their names; "" is the network itself."""
        return dict(self._parts.left)

    @property
    def has_parts(self) -> bool:
        """Whether its parts run where it cannot be captured. Weights that were given up are of no use there."""
        return not self.whole and self.keep_weights and self._parts.worthwhile

    def _as_a_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, structure = _flatten(args, kwargs)
        if forward_mode() or transformed():
            raise RuntimeError(
                "an accelerated network cannot be differentiated forward or mapped (torch.func): use the network "
                "itself (cmfast.restore)"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                "an accelerated network has no gradients: an input requires one; call it under torch.no_grad(), or use "
                "the network itself"
            )
        with torch.no_grad():
            program = self._program(tensors, structure) if all(t.numel() for t in tensors) else None
            if program is None:  # there is nothing to compute
                with turns.beside(), in_eval_mode(self.module):
                    return _without_hooks(self.module)(*args, **kwargs)
            dtypes = self._output_dtypes(program, tensors, structure)
            outputs = trace.run(self.module, program.target, program.executable, tensors, dtypes)
        return program.structure.build(outputs)

    def executable(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Executable:
        """What evaluates the network as a whole for such arguments, made where there is none yet."""
        with _autocast_off():
            return self._program(*_flatten(tuple(args), dict(kwargs or {}))).executable

    @property
    def target(self) -> Target:
        """What runs the network as it is now."""
        return self._made.target

    def _program(self, tensors: Sequence[Tensor], structure: Structure) -> _Program:
        shapes = tuple((t.shape, None if t.is_floating_point() else t.dtype) for t in tensors)
        backend = self._backend()
        narrow = frozenset(t.dtype for t in tensors if t.dtype in (torch.bfloat16, torch.float16))  # a capture reads it
        key = structure, shapes, narrow, backend
        with turns.beside(), self._lock:
            program = self._made_already(key, tensors)
        if program is not None:
            return program
        device = self._made.target.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an accelerated network is made ready at the first call with such arguments, which cannot be captured "
                "in a CUDA graph: call it once before"
            )
        with turns.alone(), self._lock:
            program = self._made_already(key, tensors)  # by another thread
            if program is None:
                program = self._made.programs[key] = self._make_or_refuse(key, tensors, structure, backend)
                while len(self._made.programs) > _MOST_PROGRAMS:
                    self._made.programs.popitem(last=False)
            return program

    def _made_already(self, key: Any, tensors: Sequence[Tensor]) -> _Program | None:
        if key in self._refused:  # whatever has changed: its forward may change something at every call
            kind, reason = self._refused[key]
            raise kind(reason)
        if self._made.watch is None or self._made.watch.changed():
            self._say_if_often()
            self._made = self._start()
        _check_devices(tensors, self._made.target.device)
        program = self._made.programs.get(key)
        if program is not None:
            self._anew = 0
            self._made.programs.move_to_end(key)
        return program

    def _say_if_often(self) -> None:
        """Warn, once in a row of calls, where each captures the network anew."""
        self._anew += 1
        if self._anew == _OFTEN and self._made.watch is not None:
            _log.warning(
                "%s was captured anew at %d calls in a row, which takes far longer than evaluating it: what has "
                "changed is %s",
                type(self.module).__name__,
                _OFTEN,
                self._made.watch.what,
            )

    def _backend(self) -> str:
        """The backend that is asked for: of this network, else of the process; "auto" where none is."""
        name, target = chosen(self.backend), self._made.target
        if name not in ("auto", *target.backends):
            place = "the CPU" if target.device.type == "cpu" and "cpu" in target.backends else "a GPU"
            raise BackendError(
                f"backend {name!r} cannot serve an accelerated network: on {place} the engine has the kernels of "
                f"{' and '.join(target.backends)}; ask for one of them, or use the network itself (cmfast.restore)"
            )
        return name

    def _make_or_refuse(self, key: Any, tensors: Sequence[Tensor], structure: Structure, backend: str) -> _Program:
        try:
            # In inference mode composite operators do not show their parts, and tensors cannot be used outside it.
            with torch.inference_mode(False), torch.no_grad(), in_eval_mode(self.module), self._unwatched():
                return self._make(self._made.target, tensors, structure, backend)
        except CaptureError as error:
            once = isinstance(error, SideEffectError) and key not in self._with_side_effects
            if once:  # the next call may have none any more
                if len(self._with_side_effects) >= _MOST_REFUSALS:
                    self._with_side_effects.clear()
                self._with_side_effects.add(key)
            elif self.whole or self.has_parts or isinstance(error, SideEffectError):
                kind = SideEffectError if isinstance(error, SideEffectError) else CaptureError
                self._refused[key] = kind, str(error)
            while len(self._refused) > _MOST_REFUSALS:
                self._refused.popitem(last=False)
            raise

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Within the block, hold no weights that are to be given up; then the network is what is left of it."""
        if self.keep_weights:
            yield
            return
        self._made.watch = None
        try:
            yield
        finally:
            self._made.watch = Watch(self.module)

    def _start(self) -> _Made:
        if any(p.dtype == torch.float64 for p in self.module.parameters()):
            raise ValueError(_FLOAT64)
        device = device_of([*self.module.parameters(), *self.module.buffers()])
        return _Made(self._target(device), Watch(self.module))

    def _target(self, device: torch.device) -> Target:
        if _on_gpu(device):
            from .cuda import GpuTarget  # the kernels' plans import triton

            options: dict[str, Any] = {"tune": self.tune, "cache": self.cache, "keep_weights": self.keep_weights}
            return GpuTarget(device, self.products, graphs=self.graphs, **options)
        if self.products == torch.float16:
            raise ValueError("accelerate: dtype must be float32 or bfloat16 on the CPU: GPUs alone serve float16")
        return CpuTarget(self.products, tune=self.tune, cache=self.cache, keep_weights=self.keep_weights)

    def _make(self, target: Target, tensors: Sequence[Tensor], structure: Structure, backend: str) -> _Program:
        network = _without_hooks(self.module)
        _refuse_hooks(network)
        args, kwargs = structure.build(tensors)
        try:
            for again in (True, False):  # another thread may draw random numbers meanwhile, but hardly twice
                before = _random_states()
                with _capturing(), _attributes_kept(network):
                    graph = capture(network, args, kwargs)
                if _random_states() == before:
                    break
                if not again:
                    raise CaptureError("its forward draws random numbers of Python or numpy")
        except CaptureError:
            raise
        except Exception as error:
            raise _RaisedError(error) from error
        if self.whole and _shares_memory(graph):
            raise CaptureError("an output is a view of an input or of another output")
        if target.device.type != "cpu":
            graph.move(target.device)
        passes = PASSES | dict(target.passes)
        rewrites = {name: passes[name](graph) for name in (passes if self.passes is None else self.passes)}
        return _Program(target, target.compile(network, graph, rewrites, backend), graph.structure)

    def _accelerate_part(self, name: str, module: nn.Module) -> "Accelerator":
        cache = None if self.cache is None else self.cache / name
        options: dict[str, Any] = {"tune": self.tune, "cache": cache, "graphs": self.graphs, "backend": self.backend}
        return Accelerator(module, self.products, **options, passes=self.passes, whole=True)

    def _output_dtypes(self, program: _Program, tensors: Sequence[Tensor], structure: Structure) -> list[torch.dtype]:
        given = tuple(t.dtype for t in tensors)
        if given not in program.dtypes:
            with _capturing(), torch.inference_mode(False), torch.no_grad(), in_eval_mode(self.module):
                args, kwargs = structure.build(tensors)
                program.dtypes[given] = output_dtypes(
                    _without_hooks(self.module), args, kwargs, program.executable.dtypes
                )
        return program.dtypes[given]


_FLOAT64 = "accelerate: float64 networks are not accelerated: convert with .float()"


def products_of(parameters: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the operands of products for a network of these parameters: what is asked for, or by default theirs.

    Raises:
        ValueError: as `cmfast.accelerate` says.
    """
    if any(p.is_meta for p in parameters):
        raise ValueError("accelerate: expected parameters on a GPU or on the CPU, got some on meta")
    known = check_dtype(dtype, device_of(parameters))
    if any(p.dtype == torch.float64 for p in parameters):
        raise ValueError(_FLOAT64)
    own = parameters[0].dtype if parameters and parameters[0].dtype in known else torch.float32
    return dtype or own


def check_dtype(dtype: torch.dtype | None, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes of products that a device serves.

    Raises:
        ValueError: as `cmfast.accelerate` says, for a dtype that is none of them.
    """
    gpu = _on_gpu(device)
    known = (torch.float32, torch.bfloat16, torch.float16) if gpu else (torch.float32, torch.bfloat16)
    if dtype not in (None, *known):
        names = "float32, bfloat16 or float16" if gpu else "float32 or bfloat16"
        hint = "" if gpu or dtype != torch.float16 else ", which GPUs alone serve"
        raise ValueError(f"accelerate: dtype must be {names}, got {dtype}{hint}")
    return known


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """The device of a network's parameters and buffers; the CPU where there are none.

    Raises:
        ValueError: they are on several devices, or on one that the engine does not serve.
    """
    devices = {t.device: None for t in tensors if not t.is_meta}  # those that were given up are nowhere
    if len(devices) > 1:
        raise ValueError(
            f"accelerate: expected all parameters on one device, got some on each of {', '.join(map(str, devices))}"
        )
    device = next(iter(devices), torch.device("cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"accelerate: expected parameters on a GPU (CUDA or ROCm) or on the CPU, got some on {device}")
    return device


def _on_gpu(device: torch.device) -> bool:
    """Whether the target for GPUs serves a device: where CMFAST_GPU_ON_CPU=1 says so, the CPU too."""
    return device.type == "cuda" or os.environ.get("CMFAST_GPU_ON_CPU") == "1"


def _check_devices(tensors: Sequence[Tensor], device: torch.device) -> None:
    if any(t.device != device and (t.ndim or t.device.type != "cpu") for t in tensors):
        devices = [str(t.device) for t in tensors]
        name = "the CPU" if device.type == "cpu" else device
        raise ValueError(f"an accelerated network expects inputs on {name}, got {devices}")


def twin(module: nn.Module) -> nn.Module:
    """Another module of the same type that shares all attributes, but whose attributes can be set on their own."""
    found = nn.Module.__new__(type(module))  # not the class's own, which may make another class, as GraphModule's does
    found.__dict__.update(module.__dict__)
    return found


def plain(module: nn.Module) -> nn.Module:
    """The network as it is without the engine."""
    found = twin(module)
    found._compiled_call_impl = None
    return found


def detached(module: nn.Module) -> nn.Module:
    """The plain network, whose own hooks can be changed on their own too."""
    found = plain(module)
    found.__dict__.update({kind: copy.copy(module.__dict__[kind]) for kind in _HOOKS})
    return found


def _without_hooks(module: nn.Module) -> nn.Module:
    """The plain network without its own hooks, which `install` runs around it; those of its submodules stay."""
    found = plain(module)
    found.__dict__.update({kind: OrderedDict() for kind in _HOOKS})
    return found


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Structure]:
    try:
        return flatten((args, kwargs))
    except TypeError as error:
        raise CaptureError(f"an accelerated network was given an argument of an unknown type: {error}") from error


@contextmanager
def _capturing() -> Iterator[None]:
    """Within the block, this thread alone has modules, and accelerated submodules are run by their own forward."""
    with turns.alone():
        before = getattr(_thread, "capturing", False)
        _thread.capturing = True
        # What `parametrize.cached()` keeps would have no data.
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            yield
        finally:
            _thread.capturing = before
            parametrize._cache_enabled = cached


def _autocast_off() -> AbstractContextManager[Any]:
    """Without autocast within the block, where there is some: what is captured, and computed beforehand, is kept."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not on:
        return nullcontext()
    found = ExitStack()
    for kind in on:
        found.enter_context(torch.autocast(kind, enabled=False))
    return found


def _random_states() -> tuple[Any, bytes]:
    """Of Python's and numpy's global random numbers: other ones once some were drawn."""
    return random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo at the end of the block what has become of the modules' attributes, and of dicts, lists and objects there.

    While a forward is captured, the tensors that it keeps in them have no data.

    Raises:
        SideEffectError: something has become of them, so that the forward cannot be captured.
    """
    held = held_by(module)
    dicts = [(d, dict(d)) for d in held.dicts]
    others = [(x, list(x)) for x in held.others]
    changed: list[str] = []
    try:
        yield
    finally:
        for d, entries in dicts:
            names = [name for name in {**entries, **d} if d.get(name, _NOTHING) is not entries.get(name, _NOTHING)]
            if names or list(d) != list(entries):
                changed += [str(n) for n in names if not alike(d.get(n, _NOTHING), entries.get(n, _NOTHING))]
                d.clear()
                d.update(entries)
        for x, items in others:
            if len(x) != len(items) or any(a is not b for a, b in zip(x, items, strict=True)):
                changed.append(f"what a {type(x).__name__} has in it")
                x.clear()
                (x.update if isinstance(x, set) else x.extend)(items)
    if changed:
        raise SideEffectError(f"{type(module).__name__}'s forward sets {', '.join(dict.fromkeys(changed))}")


_NOTHING = object()


def _shares_memory(graph: Graph) -> bool:
    """Whether an output of a network is a view of an input, of a parameter or buffer, or of another output."""
    there = {storage(value(node)) for node in graph.nodes.nodes if node.op in ("placeholder", "get_attr")}
    outputs: Any = fx.node.map_arg(graph.nodes.output_node().args[0], value)
    made = {storage(t) for t in outputs}
    return len(made) < len(outputs) or bool(made & there)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _refuse_global_hooks() -> None:
    """Raise RuntimeError where all modules have hooks, but for those of torch's own tools, and of a capture."""
    for hook in (*torch_modules._global_forward_pre_hooks.values(), *torch_modules._global_forward_hooks.values()):
        home = str(getattr(hook, "__module__", None) or type(hook).__module__)
        if home.partition(".")[0] not in ("torch", "cmfast"):
            raise RuntimeError(
                f"an accelerated network does not run the hooks of all modules, and there is one ({hook}): remove it, "
                "or use the network itself (cmfast.restore)"
            )


def _refuse_hooks(module: nn.Module) -> None:
    """Raise RuntimeError where a submodule has hooks, which do not run within a program; torch's own are captured."""
    for name, m in module.named_modules():
        hooks = [hook for kind in _HOOKS for hook in m.__dict__.get(kind, {}).values()] if name else []
        for hook in hooks:
            home = getattr(hook, "__module__", None) or type(hook).__module__
            if not home.startswith("torch.nn.utils"):
                raise RuntimeError(
                    f"an accelerated network does not run the hooks of its submodules, and {name} has one ({hook}): "
                    "remove it, or use the network itself (cmfast.restore)"
                )


def _is_recorded() -> bool:
    """Whether torch records the operators that run: for TorchScript, or torch.export and make_fx."""
    if torch._C._get_tracing_state() is not None or torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    return torch.compiler.is_exporting()


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def install(module: nn.Module, accelerator: Accelerator) -> None:
    """Let calls of the module run the accelerator: what nn.Module.compile() sets. Its own hooks run around it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "capturing", False):
            return module._call_impl(*args, **kwargs)
        if _is_recorded():
            with in_eval_mode(module) if any(m.training for m in module.modules()) else nullcontext():
                return module._call_impl(*args, **kwargs)
        if not (module._forward_hooks or module._forward_pre_hooks):
            return accelerator(*args, **kwargs)
        caller = plain(module)
        caller.__dict__["forward"] = accelerator
        return caller._call_impl(*args, **kwargs)

    call.accelerator = accelerator  # type: ignore[attr-defined]
    module._compiled_call_impl = call


def accelerator_of(module: nn.Module) -> Accelerator | None:
    """What runs an accelerated module; None for any other."""
    return getattr(module.__dict__.get("_compiled_call_impl"), "accelerator", None)
