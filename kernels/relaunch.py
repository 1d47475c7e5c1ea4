"""A recorded call as a function that makes its launches again.

The function is written in Python, of addresses, numbers, a stream and a device alone, and compiled: nothing is looked
up in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .recorder import DEVICE, STREAM, Address, Recorder, is_live

#: In the place of a result that is not asked for.
NOTHING = torch.empty(0, device="cpu")
#: Addresses of memory that no result lies in are multiples of it, as those that the allocator gives are.
_ALIGNMENT = 256


#: Of the addresses of a call's tensors, its numbers, a stream and a device's number it gives the call's results.
MadeAgain = Callable[[Sequence[int], Sequence[float], int, int], Any]


def relaunch(recorder: Recorder, results: Any, wanted: int | None = None) -> MadeAgain:
    """A function that makes a call again.

    Args:
        recorder: in which the call was made.
        results: of the call: a tensor, or several.
        wanted: how many of the results are: the others are empty. None is all.

    Raises:
        ValueError: the call cannot be made again by its launches; says why.
    """
    if recorder.failure or not recorder.launches:
        raise ValueError(recorder.failure or "nothing was launched")
    writer = _Writer(recorder)
    if isinstance(results, Tensor):
        given = writer.result(results)
    else:
        names = [NOTHING if wanted is not None and i >= wanted else t for i, t in enumerate(results)]
        given = f"({', '.join(map(writer.result, names))},)"
    return writer.function(given)


class _Writer:
    """Writes the function."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._names: dict[str, Any] = {}
        self._results: dict[int, str] = {}  # names of those that are allocations, by the allocation's number
        self._lines: list[str] = []
        self._offsets: dict[bool, dict[int, int]] = {False: {}, True: {}}  # in the memory of other allocations
        self._sizes = {False: 0, True: 0}  # of that memory, and of what of it is filled with zeros

    def result(self, tensor: Tensor) -> str:
        """The name of a result."""
        if not tensor.numel():
            return self._constant(tensor)
        number = self._recorder.allocation_of(tensor)
        if number is None or number in self._results or self._recorder.allocations[number].zeros:
            raise ValueError("a result is not an allocation of its own")
        name = self._results[number] = f"result_{number}"
        options = f"dtype={self._constant(tensor.dtype)}, device={self._constant(tensor.device)}"
        shape = f"{tuple(tensor.shape)}, {tensor.stride()}"
        self._lines.append(f"{name} = {self._constant(torch.empty_strided)}({shape}, {options})")
        self._lines.append(f"{name}_at = {name}.data_ptr()")
        return name

    def function(self, given: str) -> MadeAgain:
        launches = []
        for launch in self._recorder.launches:
            arguments = ", ".join(map(self._source, launch.arguments))
            launches.append(f"error = {self._constant(launch.call)}({arguments})")
            launches.append("if error: raise RuntimeError(error)")
        device = self._recorder.allocations[0].tensor.device if self._recorder.allocations else None
        for zeros, name in ((False, "memory"), (True, "zeros")):
            if self._sizes[zeros]:
                make = self._constant(torch.zeros if zeros else torch.empty)
                options = f"dtype={self._constant(torch.uint8)}, device={self._constant(device)}"
                self._lines.append(f"{name} = {make}({self._sizes[zeros]}, {options})")
                self._lines.append(f"{name}_at = {name}.data_ptr()")
        body = [*self._lines, *launches, f"return {given}"]
        source = "def made_again(addresses, numbers, stream, device):\n" + "".join(f"    {line}\n" for line in body)
        exec(compile(source, "<a call that is made again>", "exec"), self._names)
        return self._names["made_again"]

    def _source(self, value: Any) -> str:
        if value is STREAM:
            return "stream"
        if value is DEVICE:
            return "device"
        if isinstance(value, Address):
            return self._address(value)
        if is_live(value):
            number = f"numbers[{value.place}]"
            return number if value.function is None else f"{self._constant(value.function)}({number})"
        if isinstance(value, tuple | list) and _varies(value):
            return f"({', '.join(map(self._source, value))},)"
        return self._constant(value)

    def _address(self, value: Address) -> str:
        if value.place is not None:
            return f"addresses[{value.place}]"
        assert value.allocation is not None
        if value.allocation in self._results:
            return f"{self._results[value.allocation]}_at + {value.offset}"
        allocation = self._recorder.allocations[value.allocation]
        offsets = self._offsets[allocation.zeros]
        if value.allocation not in offsets:
            offsets[value.allocation] = self._sizes[allocation.zeros]
            size = -(-allocation.bytes // _ALIGNMENT) * _ALIGNMENT
            self._sizes[allocation.zeros] += size
        name = "zeros" if allocation.zeros else "memory"
        return f"{name}_at + {offsets[value.allocation] + value.offset}"

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self._names)}"
        self._names[name] = value
        return name


def _varies(value: Any) -> bool:
    """Whether an argument of a launch is another one in the next call, or has one in it."""
    if isinstance(value, tuple | list):
        return any(map(_varies, value))
    return isinstance(value, Address) or is_live(value)
