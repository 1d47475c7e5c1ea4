"""What this thread's calls of accelerated networks run, noted while they do."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .target import Executable, Target

_thread = threading.local()


class Run(NamedTuple):
    """One evaluation of a module's program: what ran, for which inputs, and the seconds that it took."""

    module: nn.Module
    target: Target
    executable: Executable
    inputs: Sequence[Tensor]
    seconds: float


class Trace:
    """What ran.

    Attributes:
        runs: evaluations of programs, in order.
        left: why modules were not captured, so that their own forward ran.
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.left: dict[nn.Module, str] = {}


@contextmanager
def tracing() -> Iterator[Trace]:
    """Within the block, note what this thread runs; one trace at a time."""
    before = _current()
    _thread.trace = trace = Trace()
    try:
        yield trace
    finally:
        _thread.trace = before


def is_on() -> bool:
    """Whether what this thread runs is noted."""
    return _current() is not None


def run(
    module: nn.Module,
    target: Target,
    executable: Executable,
    inputs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Evaluate a module's program, and note it."""
    trace = _current()
    if trace is None:
        return executable(inputs, dtypes)
    synchronize(target.device)
    begin = time.perf_counter()
    outputs = executable(inputs, dtypes)
    synchronize(target.device)
    trace.runs.append(Run(module, target, executable, inputs, time.perf_counter() - begin))
    return outputs


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leave(module: nn.Module, reason: str) -> None:
    """Note why a module was not captured."""
    trace = _current()
    if trace is not None:
        trace.left[module] = reason


def _current() -> Trace | None:
    return getattr(_thread, "trace", None)
