"""Calls on a GPU that are made again: their launches, without the way that leads to them.

Between an operator's call and its launches stand torch's dispatcher, the choice of a backend, the division of the work
among programs and Triton's run time: 20 to 150 µs of the host, for which the GPU waits in eager use. All that follows
from the key of a call: operator and backend, all that is no tensor, the tensors' device, dtypes, sizes, strides and
alignment, and some variables of the environment. The second call of a key is recorded while it takes the long way. From
then on `recall` makes its launches with the addresses of the tensors at hand. Numbers that are others in most calls, a
seed say, are in no key: launches are given those of their own call.

The keys are read by cmfast._cpu, from tensors that DLPack's C interface describes (torch 2.10 or newer): without it,
nothing is remembered.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import backends, native
from .recorder import Recorder, live
from .relaunch import MadeAgain, relaunch

#: Types of devices, as DLPack numbers them, whose calls are remembered: CUDA and ROCm.
DEVICES = {2, 10}
#: Calls that are remembered: as many as a few networks have at a few sizes. Then it begins anew.
MOST = 4096
#: Of operators whose last results only a gradient reads, how many `recall` gives; the others are empty.
WANTED = {"group_norm": 1, "attention": 1}

_CPU = 1
#: By key, what makes a call again; False where its launches alone are not enough; "seen" where one was made.
_calls: dict[Any, "_Again | str | bool"] = {}
#: One thread records at a time: torch keeps count of modes in variables of the process.
_recording = threading.Lock()


def recall(op: str, backend: str | None, arguments: Sequence[Any], numbers: Sequence[float] = ()) -> Any:
    """What torch.ops.cmfast gives for a call, by its launches; None where the call has to take the long way.

    Args:
        op: the operator's name.
        backend: that is asked for, by name or by `use_backend`.
        arguments: those of the operator's schema but for the backend. Each tensor is torch's own, and nobody wants to
            know of the call or to differentiate it.
        numbers: others that no key has, since they are others in most calls.
    """
    if (found := _described(arguments)) is None:
        return None
    layout, others, addresses, device_type, device = found
    try:
        again = _calls.get((op, backend, layout, others, device_type, device))
    except TypeError:  # of an argument that cannot be in a key the long way tells
        return None
    return again(addresses, numbers, device_type, device) if isinstance(again, _Again) else None


def serve(
    op: str,
    backend: str | None,
    arguments: Sequence[Any],
    function: Callable[..., Any],
    *given: Any,
    given_anew: bool = False,
) -> Any:
    """What function(*given) returns, which serves a call; the second one of a key is remembered.

    Args:
        op, backend, arguments: as for `recall`.
        function: serves the call.
        given: to the function.
        given_anew: whether what is given are the numbers of `recall`. Where the launches get them, they are to get
            those of their own call.
    """
    if (found := _described(arguments)) is None:
        return function(*given)
    layout, others, addresses, *device = found
    key = (op, backend or backends.override(), layout, others, *device)
    known = _calls.get(key)
    if known is None:
        if len(_calls) >= MOST:
            _calls.clear()
        _calls[key] = "seen"
    if known != "seen" or not _recording.acquire(blocking=False):
        return function(*given)
    try:
        with Recorder(addresses) as recorder:
            results = function(*([live(x, i) for i, x in enumerate(given)] if given_anew else given))
    finally:
        _recording.release()
    try:
        _calls[key] = _Again(recorder, relaunch(recorder, results, WANTED.get(op)))
    except ValueError:
        _calls[key] = False
    return results


def forget() -> None:
    """Forget all calls."""
    _calls.clear()


def _described(arguments: Sequence[Any]) -> Any:
    """What csrc/call_key.h says of the arguments of a call that may be remembered; else None."""
    first = arguments[0]
    if not (first.is_cuda or (first.is_cpu and _CPU in DEVICES)):
        return None
    try:
        found = native.cpu().call_key(arguments)
    except ImportError:
        return None
    return found if found is not None and found[3] in DEVICES else None


class _Again:
    """A call that is made again."""

    def __init__(self, recorder: Recorder, launches: MadeAgain) -> None:
        self._unless, self._launches = [*recorder.unless], launches

    def __call__(self, addresses: Sequence[int], numbers: Sequence[float], device_type: int, device: int) -> Any:
        """The results; None where the tensors' device is not the current one, or somebody has to know of a launch."""
        for somebody in self._unless:
            if somebody():
                return None
        if device_type == _CPU:
            return self._launches(addresses, numbers, 0, -1)
        if torch._C._cuda_getDevice() != device:
            return None
        return self._launches(addresses, numbers, torch._C._cuda_getCurrentRawStream(device), device)
