"""What an operator does while it runs, written down so that it can be done again with other tensors.

A `Recorder` notes what is allocated and launched within its `with` block. Among the arguments of a launch, an `Address`
says of which tensor it is: of one that the operator was given, or of memory that was allocated. A number that the next
call may have another of, a seed say, is given to the operator as a `LiveFloat` or `LiveInt`. An operator that does
more, such as copying a tensor that its kernel cannot read as it is, has failed to be recorded.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: In the place of the current stream and of the device's number, in what a launch was given.
STREAM, DEVICE = object(), object()

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}


class _Thread(threading.local):
    recorder: "Recorder | None" = None


_thread = _Thread()


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Memory that was allocated: whether it was filled with zeros, and the tensor, which holds it until the end."""

    tensor: Tensor
    zeros: bool

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.tensor.untyped_storage().nbytes()


class Address(int):
    """An address whose origin is known.

    Attributes:
        place: of the operator's tensor whose first element lies there; else None.
        allocation: in which it lies, the number of one; None where it is a tensor's.
        offset: bytes from the begin of the allocation.
    """

    place: int | None = None
    allocation: int | None = None
    offset: int = 0


class _Live:
    """A number that may be another one in the next call.

    Attributes:
        place: among the call's numbers.
        function: what makes it of the call's number; None where it is that itself.
    """

    place: int = 0
    function: Callable[[Any], Any] | None = None


class LiveFloat(_Live, float):
    """A live float."""


class LiveInt(_Live, int):
    """A live integer."""


def live(value: float, place: int, function: Callable[[Any], Any] | None = None) -> LiveFloat | LiveInt:
    """A number, with where it comes from."""
    found = LiveInt(value) if isinstance(value, int) else LiveFloat(value)
    found.place, found.function = place, function
    return found


def derived(function: Callable[[Any], Any], value: Any) -> Any:
    """function(value), which is live where the value is."""
    found = function(plain(value))
    if not isinstance(value, _Live):
        return found
    before = value.function
    return live(found, value.place, function if before is None else lambda number: function(before(number)))


def is_live(value: Any) -> bool:
    """Whether a number may be another one in the next call."""
    return isinstance(value, _Live)


def plain(value: Any) -> Any:
    """What a launch is to be given: of a number, itself without where it comes from."""
    if isinstance(value, LiveInt):
        return int(value)
    return float(value) if isinstance(value, LiveFloat) else value


@dataclasses.dataclass(frozen=True)
class Launched:
    """A call that launched a kernel: of it a text that is not empty is an error."""

    call: Callable[..., str | None]
    arguments: Sequence[Any]


class Recorder(TorchDispatchMode):
    """Notes what an operator does.

    Attributes:
        allocations: in order.
        launches: in order.
        failure: why what was done cannot be done again by its launches; "" where it can.
        unless: functions that say whether somebody has to know of each launch, so that it is not to be made alone.
    """

    def __init__(self, addresses: Sequence[int]) -> None:
        """`addresses` are those of the operator's tensors, in their order."""
        super().__init__()
        self.allocations: list[Allocation] = []
        self.launches: list[Launched] = []
        self.failure = ""
        self.unless: set[Callable[[], bool]] = set()
        self._places = {address: place for place, address in reversed([*enumerate(addresses)])}
        self._begins: dict[int, int] = {}
        self._before: Recorder | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch shall hide the mode from its compiler, for which it would import all of that."""
        return False

    def __enter__(self) -> "Recorder":
        self._before, _thread.recorder = _thread.recorder, self
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        _thread.recorder, self._before = self._before, None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in _EMPTY or name in _ZEROS:
            self._begins[result.untyped_storage().data_ptr()] = len(self.allocations)
            self.allocations.append(Allocation(result, name in _ZEROS))
        elif func._schema.is_mutable or not _is_view(result, args):
            self.fail(f"{func} was run")
        return result

    def fail(self, why: str) -> None:
        """Say that this cannot be done again by its launches."""
        self.failure = self.failure or why

    def launched(self, call: Callable[..., str | None], arguments: Sequence[Any]) -> None:
        """Note a launch. In its arguments STREAM and DEVICE stand for what is current."""
        self.launches.append(Launched(call, arguments))

    def address(self, tensor: Tensor) -> int:
        """The tensor's address, as it is to be noted."""
        number = tensor.data_ptr()
        found = Address(number)
        found.place = self._places.get(number)
        if found.place is None and number:
            begin = tensor.untyped_storage().data_ptr()
            found.allocation, found.offset = self._begins.get(begin), number - begin
            if found.allocation is None:
                self.fail("a launch was given a tensor that is neither an argument nor allocated")
        return found if number else 0

    def allocation_of(self, tensor: Tensor) -> int | None:
        """The number of the allocation that a tensor is all of; None where it is of none, or a part."""
        number = self._begins.get(tensor.data_ptr())
        whole = number is not None and self.allocations[number].bytes == _span(tensor)
        return number if whole else None


def current() -> Recorder | None:
    """What notes this thread's launches."""
    return _thread.recorder


def _span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    """Whether a result is a tensor that shares the memory of an argument."""
    if not isinstance(result, Tensor):
        return False
    storage = result.untyped_storage()._cdata
    return any(isinstance(t, Tensor) and t.untyped_storage()._cdata == storage for t in args)
