"""Has a network changed since it was captured? Its modules, their attributes, and the values of its tensors."""

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import native
from . import snapshots
from .held import UNREAD, alike, held_by


class Watch:
    """What a network was: `changed` says whether it still is.

    Seen are: a module, parameter, buffer, hook or forward function that was added, replaced or removed; any other
    attribute of a module that was set, or its class; dicts, lists, sets and objects among them that were changed, and
    what is in these, modules and tensors too; writes to tensors in place. Writes that torch does not count, through
    `.data` or numpy, are seen by a checksum: of all of a tensor up to 256 bytes, and of 8 words and the last bytes of a
    larger one. A GPU's memory is not read, since that would wait for the GPU: such writes are not seen there, but that
    a tensor has other memory is. Whether modules are in training mode does not matter, nor whether something else
    evaluates them.

    Attributes:
        what: has changed, for messages.
    """

    what = ""

    def __init__(self, module: nn.Module) -> None:
        """Remember the network as it is."""
        # What is compared is held, so that nothing made later can take its place in memory.
        held = held_by(module)
        self._dicts, self._owners = held.dicts, held.owners
        self._types = [type(owner) for owner in held.owners]
        self._copies = [dict(found) for found in self._dicts]
        found = _snapshots()
        self._look = found.look
        self._snapshot = found.Snapshot(self._dicts, self._owners)
        self._others = [(value, copy.copy(value)) for value in held.others]
        tensors = [t for t in held.tensors if not isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer)]
        placed = [t.device.type in ("cpu", "cuda") and _has_memory(t) for t in tensors]
        memory = {id(t): _memory(t) for t, there in zip(tensors, placed, strict=True) if there and not t.is_cuda}
        read = list(memory.values())
        # Of a small one everything is read: torch need not be asked how often it was written to.
        counted = [not t.is_inference() and memory.get(id(t), _LARGE)[1] > snapshots.SMALL for t in tensors]
        seen = list(zip(tensors, counted, placed, strict=True))
        self._tensors = found.TensorSnapshot(seen, read)
        self._on_cpu = bool(read)  # where threads of the processor are about to evaluate the network, they look as well

    def changed(self) -> bool:
        """Whether the network is another, as far as can be seen."""
        threads = torch.get_num_threads() if self._on_cpu else 1
        i, same = self._look(self._snapshot, self._tensors, threads)
        while i >= 0:
            if type(self._owners[i]) is not self._types[i] or not _same(
                self._dicts[i], self._copies[i], self._types[i]
            ):
                self.what = _difference(self._dicts[i], self._copies[i], self._types[i])
                return True
            self._copies[i] = dict(self._dicts[i])  # numbers or the mode: equal, or of no matter
            self._snapshot.accept(i)
            i = self._snapshot.first_difference()
        try:
            if self._others and any(not _same_items(container, before) for container, before in self._others):
                self.what = "a list, a set or a deque"
                return True
        except (RuntimeError, TypeError, ValueError):  # a tensor of several elements has no truth: it was replaced
            self.what = "a tensor in a list"
            return True
        self.what = "" if same else "a tensor"
        return not same


#: A memory that is not read as a whole.
_LARGE = (0, snapshots.SMALL + 1)


def _snapshots() -> ModuleType:
    """What has the snapshots: the extension, or Python where it was not built."""
    try:
        return native.cpu()
    except ImportError:
        return snapshots


def _same(state: dict[str, Any], before: dict[str, Any], owner: type) -> bool:
    """Whether two dicts differ in nothing but equal numbers, strings and the like, and what no forward reads."""
    unread = _unread(owner)
    names = [name for name in state if name not in unread]
    if names != [name for name in before if name not in unread]:
        return False
    for name in names:
        value, other = state[name], before[name]
        if value is other:
            continue
        if not alike(value, other):
            return False
    return True


def _same_items(now: Any, before: Any) -> bool:
    """Whether two lists, deques or sets have the same objects or equal numbers, strings and the like in them."""
    if isinstance(now, set):
        return bool(now == before)
    return len(now) == len(before) and all(a is b or alike(a, b) for a, b in zip(now, before, strict=True))


def _difference(state: dict[str, Any], before: dict[str, Any], owner: type) -> str:
    """Which entries of a dict have changed, and of what it is."""
    names = [n for n in {**before, **state} if n not in _unread(owner) and (n not in state or n not in before)]
    names += [n for n in before if n in state and state[n] is not before[n] and not alike(state[n], before[n])]
    of = "a dict" if owner is type(None) else owner.__name__
    return f"{', '.join(map(str, names)) or 'the class'} of {of}"


def _unread(owner: type) -> tuple[str, ...]:
    """Attributes of a module that no forward reads; those of objects, and entries of dicts, are read."""
    return UNREAD if issubclass(owner, nn.Module) else ()


def _has_memory(t: Tensor) -> bool:
    """Whether a tensor's elements lie somewhere; those of wrappers, sparse and uninitialised ones do not."""
    try:
        t.data_ptr(), t.stride(), t.untyped_storage()
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return t.layout == torch.strided


def _memory(t: Tensor) -> tuple[int, int]:
    """The address of a tensor's elements, and the bytes from the first to the last; 0 for one that has none."""
    if not t.numel() or not t.data_ptr():  # its storage was freed
        return 0, 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), span * t.element_size()
