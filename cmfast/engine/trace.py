"""What this thread's calls of accelerated networks run, noted while they do."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .steps import Timed
from .target import Executable, Target

_thread = threading.local()


class Run(NamedTuple):
    """One evaluation of a module's program.

    Attributes:
        module: the captured module.
        target: what it runs on.
        executable: what ran.
        begin: when, by `time.perf_counter`.
        seconds: that it took.
        timed: its steps, where they were timed; without the outputs.
    """

    module: nn.Module
    target: Target
    executable: Executable
    begin: float
    seconds: float
    timed: Timed | None


class Trace:
    """What ran.

    Attributes:
        steps_timed: whether programs are run step by step, and the steps timed.
        runs: evaluations of programs, in order.
        left: why modules were not captured, so that their own forward ran.
    """

    def __init__(self, *, steps_timed: bool) -> None:
        self.steps_timed = steps_timed
        self.runs: list[Run] = []
        self.left: dict[nn.Module, str] = {}


@contextmanager
def tracing(*, steps_timed: bool = False) -> Iterator[Trace]:
    """Within the block, note what this thread runs; one trace at a time."""
    before = _current()
    _thread.trace = trace = Trace(steps_timed=steps_timed)
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
    timed = None
    synchronize(target.device)
    begin = time.perf_counter()
    if trace.steps_timed:
        with _disable_current_modes():  # of what notes torch's operators outside the programs
            timed = executable.time(inputs, dtypes)
        outputs = timed.outputs
    else:
        outputs = executable(inputs, dtypes)
    synchronize(target.device)
    seconds = time.perf_counter() - begin
    timed = timed and timed._replace(outputs=[])
    trace.runs.append(Run(module, target, executable, begin, seconds, timed))
    return outputs


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # not the device, while another thread captures


def leave(module: nn.Module, reason: str) -> None:
    """Note why a module was not captured."""
    trace = _current()
    if trace is not None:
        trace.left[module] = reason


def _current() -> Trace | None:
    return getattr(_thread, "trace", None)
