"""Which of a network's modules a thread is in while their forward runs, and how their dotted names nest."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Layers:
    """Follows the calls of modules that this thread makes.

    Attributes:
        current: name of the innermost module whose forward runs; modules without a name have that of their caller.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        """Take the names of modules."""
        self._names = names
        self._stack = [""]

    @property
    def current(self) -> str:
        """Name of the innermost module whose forward runs."""
        return self._stack[-1]

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Within the block, `current` is up to date: torch's hooks of all modules' calls see to it."""
        thread = threading.get_ident()

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self._stack.append(self._names.get(module, self.current))

        def leave(*_: Any) -> None:
            if threading.get_ident() == thread and len(self._stack) > 1:
                self._stack.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Nesting:
    """Opens and closes the ranges of modules, each within that of the module it is a part of.

    For "a.b.c" these are "a", "a.b" and "a.b.c".
    """

    def __init__(self, begin: Callable[[str], None], end: Callable[[], None]) -> None:
        """Take what begins a range of a name, and what ends the one that was begun last."""
        self._begin, self._end = begin, end
        self._open: list[str] = []

    def enter(self, layer: str) -> None:
        """Be in the module of this dotted name: "" is the network, which has no range."""
        parts = layer.split(".") if layer else []
        wanted = [".".join(parts[: i + 1]) for i in range(len(parts))]
        kept = _equal([self._open, wanted])
        for _ in self._open[kept:]:
            self._end()
        for name in wanted[kept:]:
            self._begin(name)
        self._open = wanted


def common(layers: Sequence[str]) -> str:
    """The innermost module that all of these are, or are a part of."""
    parts = [layer.split(".") for layer in layers]
    return ".".join(parts[0][: _equal(parts)])


def _equal(lists: Sequence[Sequence[str]]) -> int:
    """How many of the first elements are the same in all lists."""
    columns = zip(*lists, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, lists)))
