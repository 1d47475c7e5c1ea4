"""What a network holds: its modules' attributes, and what is in these."""

import functools
import sys
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Iterable
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn


class Held:
    """What a network holds.

    Attributes:
        dicts: the attributes of its modules, those of objects among them, and dicts.
        owners: of each dict the module or the object that it has the attributes of; None of other dicts.
        others: lists, sets and deques.
    """

    def __init__(self) -> None:
        self.dicts: list[dict[str, Any]] = []
        self.owners: list[Any] = []
        self.others: list[list | set | deque] = []
        self._tensors: dict[int, Tensor] = {}
        self._seen: dict[int, int] = {}  # how many levels below were looked at

    @property
    def tensors(self) -> list[Tensor]:
        """Each once."""
        return list(self._tensors.values())

    def add_module(self, module: nn.Module, depth: int) -> None:
        """Add a module with its submodules; what is nested in their attributes, so many levels deep."""
        deeper = [m for m in module.modules() if self._seen.get(id(m), -1) < depth]
        for m in deeper:
            if id(m) not in self._seen:
                self._add_dict(m.__dict__, m)
            self._seen[id(m)] = depth
        for m in deeper:
            for name, value in m.__dict__.items():
                if name not in _NO_MATTER and name not in UNREAD:
                    self._add(value, depth)

    def _add_dict(self, found: dict[str, Any], owner: Any) -> None:
        self.dicts.append(found)
        self.owners.append(owner)

    def _add(self, value: Any, depth: int) -> None:
        if type(value) in _PLAIN:
            return
        if isinstance(value, Tensor):
            self._tensors[id(value)] = value
        if depth == 0 or isinstance(value, Tensor | type):
            return
        known = self._seen.get(id(value), 0)  # at most what is nearer to a module is looked at again
        if known >= depth:
            return
        if isinstance(value, nn.Module):
            self.add_module(value, depth - 1)
            return
        read = _read_by(value)
        if read is None and not isinstance(value, dict | list | set | deque | tuple) and not _is_object(value):
            return
        self._seen[id(value)] = depth
        inner: Iterable[Any] = value
        if read is not None:
            inner = read
        elif isinstance(value, dict):
            inner = value.values()
            if not known:
                self._add_dict(value, None)
        elif isinstance(value, list | set | deque):
            if not known:
                self.others.append(value)
        elif not isinstance(value, tuple):
            inner = value.__dict__.values()
            if not known:
                self._add_dict(value.__dict__, value)
        for part in list(inner):
            self._add(part, depth - 1)


def held_by(module: nn.Module) -> Held:
    """What a network holds: attributes of its modules, and what they hold in turn.

    Objects are those of a class of other packages than torch and Python's own, such as an attention processor of
    diffusers.
    """
    found = Held()
    found.add_module(module, _DEPTH)
    return found


def _read_by(value: Any) -> list[Any] | None:
    """What a function reads besides its arguments; None of what is none.

    It may take the place of a module's forward: that of another module, as LoRAs have it, or one with a closure.
    """
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
    return None


#: A variable of a closure that has not been set.
_EMPTY = CellType()


def _is_object(value: Any) -> bool:
    if isinstance(value, SimpleNamespace | Namespace):
        return True
    home = type(value).__module__.partition(".")[0]
    return home != "torch" and home not in sys.stdlib_module_names and isinstance(getattr(value, "__dict__", 0), dict)


#: Levels of dicts, lists, tuples, sets and objects in one another, from a module's attributes on.
_DEPTH = 4
#: Classes of values that nothing can be changed of, or that may be of nothing.
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), *weakref.ProxyTypes))
#: Attributes of every module that a forward does not read.
_NO_MATTER = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
#: Attributes of a module that may change: its mode, and what evaluates it.
UNREAD = ("training", "_compiled_call_impl")
#: Classes of values that are compared, not taken for others where they are other objects.
_SIMPLE = (bool, int, float, complex, str, bytes, tuple, type(None))


def alike(value: Any, other: Any) -> bool:
    """Whether two values are equal numbers, strings or the like, or tuples of these and of the same objects."""
    if type(value) is not type(other) or not isinstance(value, _SIMPLE):
        return False
    if isinstance(value, tuple):
        return len(value) == len(other) and all(a is b or alike(a, b) for a, b in zip(value, other, strict=True))
    return repr(value) == repr(other)
