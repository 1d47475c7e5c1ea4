"""Has a network changed since it was captured? Its modules, their attributes, and the values of its tensors."""

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import native
from . import snapshots


class Watch:
    """What a network was: `changed` says whether it still is.

    Seen are: a module, parameter, buffer, hook or forward function that was added, replaced or removed; any other
    attribute of a module that was set, and dicts, lists, sets and objects among them that were changed; writes to
    parameters and buffers in place. Writes that torch does not count, through `.data` or numpy, are seen by a checksum:
    of all of a tensor up to 256 bytes, and of 8 words and the last bytes of a larger one. A GPU's memory is not read,
    since that would wait for the GPU: such writes are not seen there, but that a tensor has other memory is. Whether
    modules are in training mode does not matter, nor whether something else evaluates them.
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember the network as it is."""
        # What is compared is held, so that nothing made later can take its place in memory.
        self._dicts, others = attributes(module)
        self._copies = [dict(found) for found in self._dicts]
        found = _snapshots()
        self._look = found.look
        self._snapshot = found.Snapshot(self._dicts)
        self._others = [(value, copy.copy(value)) for value in others]
        held = [value for found in self._copies for value in found.values() if isinstance(value, Tensor)]
        tensors = list({id(t): t for t in held}.values())
        placed = [t.device.type in ("cpu", "cuda") for t in tensors]
        memory = {id(t): _memory(t) for t in tensors if t.device.type == "cpu"}
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
            if not _same(self._dicts[i], self._copies[i]):
                return True
            self._copies[i] = dict(self._dicts[i])  # numbers or the mode: equal, or of no matter
            self._snapshot.accept(i)
            i = self._snapshot.first_difference()
        try:
            if self._others and any(container != before for container, before in self._others):
                return True
        except (RuntimeError, TypeError, ValueError):  # a tensor of several elements has no truth: it was replaced
            return True
        return not same


#: A memory that is not read as a whole.
_LARGE = (0, snapshots.SMALL + 1)


def _snapshots() -> ModuleType:
    """What has the snapshots: the extension, or Python where it was not built."""
    try:
        return native.cpu()
    except ImportError:
        return snapshots


def attributes(module: nn.Module) -> tuple[list[dict[str, Any]], list[list | set]]:
    """What a network holds: attributes of its modules, dicts among them and the attributes of objects; lists and sets.

    Objects are those of a class of other packages than torch, such as an attention processor of diffusers.
    """
    modules = [m.__dict__ for m in module.modules()]
    values = [value for state in modules for name, value in state.items() if name not in _NO_MATTER]
    found = modules + [value for value in values if isinstance(value, dict)]
    objects = {id(value): value.__dict__ for value in values if _is_object(value)}
    return found + list(objects.values()), [value for value in values if isinstance(value, list | set)]


def _is_object(value: Any) -> bool:
    if isinstance(value, Tensor | nn.Module | type | dict | list | set) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in ("builtins", "functools", "torch")


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
_UNREAD = ("training", "_compiled_call_impl")
_SIMPLE = (bool, int, float, complex, str, bytes, tuple, type(None))


def _same(state: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two dicts differ in nothing but equal numbers, strings and the like, and what no forward reads."""
    names = [name for name in state if name not in _UNREAD]
    if names != [name for name in before if name not in _UNREAD]:
        return False
    for name in names:
        value, other = state[name], before[name]
        if value is other:
            continue
        if type(value) is not type(other) or not isinstance(value, _SIMPLE) or repr(value) != repr(other):
            return False
    return True


def _memory(t: Tensor) -> tuple[int, int]:
    """The address of a tensor's elements, and the bytes from the first to the last; 0 for one of no elements."""
    if not t.numel():
        return 0, 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), span * t.element_size()
