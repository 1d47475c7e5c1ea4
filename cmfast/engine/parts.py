"""A network that cannot be captured as a whole: its own forward runs, with the largest parts that can be accelerated.

What cannot be captured is then done by torch, as the network says: random numbers, courses that depend on values,
attributes that its forward sets.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import trace
from .capture import CaptureError

_log = logging.getLogger(__name__)
_thread = threading.local()
#: Modules whose calls lead to parts: how many forwards run that want it, and what is called. The lock guards both.
_leading: dict[nn.Module, tuple[int, Callable[..., Any]]] = {}
_lock = threading.Lock()


class Parts:
    """Runs a network's own forward, in which calls of its submodules go to the engine.

    A submodule that cannot be captured, or has hooks, runs its own forward too, with its submodules in the same way.
    While a forward runs, nn.Module's `_compiled_call_impl` of the submodules leads here, which only matters to threads
    that run such a forward; afterwards the network is what it was.

    Attributes:
        left: why modules were not captured, by their names; of the network itself, the name is "".
    """

    def __init__(self, module: nn.Module, accelerate: Callable[[str, nn.Module], Callable[..., Any]]) -> None:
        """Take a network, and what makes of a submodule and its name what evaluates it or raises CaptureError."""
        self._module, self._accelerate = module, accelerate
        self._parts: dict[nn.Module, _Part] = {}
        self._lock = threading.Lock()
        self._running = 0
        self.left: dict[str, str] = {}

    @property
    def worthwhile(self) -> bool:
        """Whether the network has submodules that are worth it."""
        return any(True for _ in _candidates(self._module))

    def __call__(self, reason: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Evaluate the network, which cannot be captured for this reason."""
        with self._installed(), _current(self):
            outputs = self._module.forward(*args, **kwargs)
        self._leave("", self._module, reason)
        return outputs

    def run(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Evaluate a submodule, which was called by the network's forward."""
        part = self._parts.get(module)
        hooked = module._forward_hooks or module._forward_pre_hooks
        if part is None or hooked or torch.is_grad_enabled():  # the network wants gradients
            return module._call_impl(*args, **kwargs)
        try:
            with _current(None):
                return part.accelerated(*args, **kwargs)
        except CaptureError as error:
            reason = str(error)
        outputs = module._call_impl(*args, **kwargs)
        self._leave(part.name, module, reason)
        return outputs

    def _leave(self, name: str, module: nn.Module, reason: str) -> None:
        trace.leave(module, reason)
        if name not in self.left:
            self.left[name] = reason
            whole = type(self._module).__name__
            _log.warning(
                "%s is not accelerated as a whole, its parts are: %s", f"{name} of {whole}" if name else whole, reason
            )

    @contextmanager
    def _installed(self) -> Iterator[None]:
        with self._lock:
            found = {module: self._part(name, module) for name, module in _candidates(self._module)}
            if not self._running:
                self._parts = found
            else:  # another thread runs what was there before
                self._parts = self._parts | found
            self._running += 1
        try:
            with _led(found):
                yield
        finally:
            with self._lock:
                self._running -= 1

    def _part(self, name: str, module: nn.Module) -> "_Part":
        return self._parts.get(module) or _Part(name, self._accelerate(name, module))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A submodule's name, and what evaluates it."""

    name: str
    accelerated: Callable[..., Any]


@contextmanager
def _led(modules: Collection[nn.Module]) -> Iterator[None]:
    """Within the block, calls of the modules lead to the parts of the network whose forward the calling thread runs.

    Several networks may share a module: it is what it was when the last of their forwards has ended.
    """
    with _lock:
        for module in modules:
            count, call = _leading.get(module) or (0, _leader(module))
            _leading[module] = count + 1, call
            if module._compiled_call_impl is None:
                module._compiled_call_impl = call
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                count, call = _leading.pop(module)
                if count > 1:
                    _leading[module] = count - 1, call
                elif module._compiled_call_impl is call:
                    del module.__dict__["_compiled_call_impl"]


def _leader(module: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        running: Parts | None = getattr(_thread, "parts", None)
        return running.run(module, args, kwargs) if running else module._call_impl(*args, **kwargs)

    return call


@contextmanager
def _current(parts: Parts | None) -> Iterator[None]:
    """Within the block, calls of submodules by this thread are run by `parts`; by themselves, where that is None."""
    before = getattr(_thread, "parts", None)
    _thread.parts = parts
    try:
        yield
    finally:
        _thread.parts = before


def _candidates(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules with weights, but for torch's own single layers: there is nothing to fuse in these."""
    modules = dict(module.named_modules())
    weighted = {""}
    for name, m in modules.items():
        if any(p is not None for p in m._parameters.values()):
            while name not in weighted:
                weighted.add(name)
                name = name.rpartition(".")[0]
    for name, m in modules.items():
        single = not m._modules and type(m).__module__.startswith("torch.nn.")
        if name and name in weighted and not single:
            yield name, m
