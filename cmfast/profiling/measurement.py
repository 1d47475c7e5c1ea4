"""Where the time of a call goes: it is made as it is and recorded, in turn, and the fastest of each are compared."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..engine.trace import synchronize
from .recording import Recording, record

#: Where no number of rounds is given, they go on until the recorded calls and the others agree within this share, for
#: at least as many rounds and at most as many seconds.
_AGREE, _FEWEST, _SECONDS = 0.02, 5, 6.0
#: Before each call that takes no longer than so many seconds, others bring back to the caches what recording put out.
_SHORT, _WARMING = 0.02, 2
#: Seconds in calls after which the fastest of two that are alike differ by a percent.
_TOLD_APART = 0.2


@dataclasses.dataclass(frozen=True)
class Measured:
    """A call that was measured.

    The fastest calls are those that other work of the machine delayed least. So the sum of a recording's operations and
    the time of a call that is not recorded can be compared.

    Attributes:
        seconds: of the fastest call, when nothing is recorded.
        median_seconds: the median of these calls.
        rounds: how many there were.
        outside: seconds in no operator: Python, and the engine's checks for changes of the network.
        recording: the fastest of the recorded calls. Where torch's operators were recorded one by one, each took as
            long as when it was fastest: recording delays the one in this call, another in that.
    """

    seconds: float
    median_seconds: float
    rounds: int
    outside: float
    recording: Recording


@torch.no_grad()
def measure(
    call: Callable[[], Any],
    names: Mapping[nn.Module, str],
    device: torch.device,
    rounds: int | None = None,
    *,
    recorded: Callable[[], Any] | None = None,
    stage: Callable[[], str] = lambda: "",
) -> Measured:
    """Make a call this many times as it is, and as often recorded, in turn, after a first one that prepares it.

    Args:
        call: evaluates networks whose modules have these names.
        names: of modules.
        device: where the networks are.
        rounds: how often; None means until both agree, at least 5 times, but no longer than 6 seconds
            if twice is done by then.
        recorded: what is recorded, if not that call.
        stage: see `recording.record`.
    """
    call()
    seconds: list[float] = []
    outside: list[float] = []
    best: Recording | None = None
    left, started = 0.0, time.perf_counter()
    while best is None or not _is_enough(rounds, len(seconds), min(seconds), best.busy + left, started):
        for _ in range(_WARMING if not seconds or seconds[-1] < _SHORT else 0):
            call()
        seconds.append(_timed(call, device))
        recording = record(recorded or call, names, device, stage=stage, like=best)
        outside.append(recording.seconds - recording.in_programs)
        best = recording if best is None else _faster(best, recording)
        # Recording torch's operators one by one takes time itself: then what is left of the call is outside them.
        left = min(outside) if best.whole else max(0.0, min(seconds) - best.busy)
    return Measured(min(seconds), statistics.median(seconds), len(seconds), left, best)


@torch.no_grad()
def fastest_in_turn(calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int | None = None) -> list[float]:
    """Seconds of the fastest of as many rounds of each call, which are made in turn, after first ones.

    Args:
        calls: what is made.
        device: where.
        rounds: how many; None means at least 5, and as many as take 0.2 seconds.
    """
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    while len(found[0]) < (rounds or _FEWEST) or (rounds is None and sum(found[0]) < _TOLD_APART):
        for call, seconds in zip(calls, found, strict=True):
            for _ in range(_WARMING if not seconds or seconds[-1] < _SHORT else 0):
                call()
            seconds.append(_timed(call, device))
    return [min(seconds) for seconds in found]


def _faster(one: Recording, other: Recording) -> Recording:
    if other.busy < one.busy:
        one, other = other, one
    if not one.whole and [o.operator for o in one.operations] == [o.operator for o in other.operations]:
        for mine, its in zip(one.operations, other.operations, strict=True):
            mine.seconds = min(mine.seconds, its.seconds)
    return one


def _is_enough(rounds: int | None, done: int, whole: float, parts: float, started: float) -> bool:
    if rounds is not None:
        return done >= rounds
    late = done >= min(_FEWEST, 2) and time.perf_counter() - started > _SECONDS
    return late or (done >= _FEWEST and abs(parts - whole) < _AGREE * whole)


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin
