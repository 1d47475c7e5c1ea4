"""Where the time of an accelerated call goes: medians of the call, of its programs and of their steps."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..engine.steps import StepTime
from ..engine.trace import Trace, tracing


class ProgramTime(NamedTuple):
    """A program that ran, by its module, and the seconds of its steps."""

    module: nn.Module
    steps: list[StepTime]

    @property
    def seconds(self) -> float:
        """Those of all steps."""
        return sum(step.seconds for step in self.steps)


class Timing(NamedTuple):
    """Seconds of an accelerated call.

    Attributes:
        whole: of the call.
        outside: of what no program does: the forward of modules that are not captured, and the engine's own checks.
        programs: of each program that ran, in order.
        trace: what one of the calls ran.
    """

    whole: float
    outside: float
    programs: list[ProgramTime]
    trace: Trace


@torch.no_grad()
def measure(call: Callable[[], Any], rounds: int) -> Timing:
    """Measure a call of an accelerated network this many times, after a first one that prepares its programs."""
    call()
    whole, outside = [], []
    for _ in range(rounds):
        with tracing() as trace:
            begin = time.perf_counter()
            call()  # what is traced is waited for
            whole.append(time.perf_counter() - begin)
        outside.append(whole[-1] - sum(run.seconds for run in trace.runs))
    programs = []
    for run in trace.runs:
        each = zip(*(run.executable.time(run.inputs) for _ in range(rounds)), strict=True)
        steps = [StepTime(of[0].step, statistics.median(t.seconds for t in of)) for of in each]
        programs.append(ProgramTime(run.module, steps))
    return Timing(statistics.median(whole), statistics.median(outside), programs, trace)
