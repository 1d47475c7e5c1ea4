"""Steps with their memory: what runs."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels import native
from ...kernels.cpu import memory
from .. import arena
from ..steps import Step, Steps, StepTime, Timed


class Executable:
    """A network evaluation at one shape of its inputs. Several threads may call it: one at a time has its memory.

    Attributes:
        steps: what it does.
        rewrites: how many times each pass rewrote the graph.
        dtypes: those of the outputs, as the graph has them.
        bytes: size of the memory of all its values.
    """

    def __init__(
        self, steps: Steps, rewrites: Mapping[str, int] | None = None, dtypes: Sequence[torch.dtype] | None = None
    ) -> None:
        """`dtypes` are by default those in which the outputs are computed."""
        self.steps = steps
        self.rewrites = dict(rewrites or {})
        self.bytes = arena.plan(steps.buffers)
        self._arena = memory.empty(self.bytes)
        self._lock = threading.Lock()
        self._inputs = self._real(steps.inputs)
        self._outputs = self._real(steps.outputs)
        self.dtypes = [t.dtype for t in self._outputs] if dtypes is None else list(dtypes)
        self._segments: list[tuple[Any, list[Step]]] = []
        self._alive: list[Any] = []  # what the programs have the addresses of
        for step in steps.steps:
            self._append(step)

    def _append(self, step: Step) -> None:
        arguments = self._real(step.arguments)
        self._alive.append(arguments)
        if step.reason:
            self._segments.append((_Torch(step.call, arguments), [step]))
            return
        if not self._segments or isinstance(self._segments[-1][0], _Torch):
            self._segments.append((native.cpu().Program(), []))
        program, done = self._segments[-1]
        with native.recording(program):
            step.call(*arguments)
        done.append(step)
        assert len(program) == len(done), f"{step.operator} is not one call of a kernel"

    def _real(self, values: Any) -> Any:
        """Values with their place in memory."""
        return pytree.tree_map_only(
            Tensor, lambda t: arena.view(self._arena, self.steps.buffer(t), t) if t.is_meta else t, values
        )

    def __call__(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
        """Evaluate; outputs are contiguous tensors of the dtypes, by default those of the graph."""
        with self._lock:
            self._fill(inputs)
            threads = torch.get_num_threads()
            for segment, _ in self._segments:
                error = segment.run(threads)
                if error:
                    raise RuntimeError(f"cmfast._cpu: {error}")
            return self._give(dtypes)

    def time(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> Timed:
        """Evaluate in the same way, and take the time of each step."""
        with self._lock:
            begin = time.perf_counter()
            self._fill(inputs)
            filling = time.perf_counter() - begin
            seconds: list[float] = []
            threads = torch.get_num_threads()
            for segment, _ in self._segments:
                error, each = segment.time(threads)
                if error:
                    raise RuntimeError(f"cmfast._cpu: {error}")
                seconds += each
            begin = time.perf_counter()
            outputs = self._give(dtypes)
            giving = time.perf_counter() - begin
        return Timed(outputs, filling, list(map(StepTime, self.steps.steps, seconds)), giving)

    def _fill(self, inputs: Sequence[Tensor]) -> None:
        for slot, given in zip(self._inputs, inputs, strict=True):
            slot.copy_(given)

    def _give(self, dtypes: Sequence[torch.dtype] | None) -> list[Tensor]:
        wanted = zip(self._outputs, self.dtypes if dtypes is None else dtypes, strict=True)
        return [torch.empty(t.shape, dtype=dtype, device="cpu").copy_(t) for t, dtype in wanted]


class _Torch:
    """A step that torch serves, with the interface of a program."""

    def __init__(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._call, self._arguments = call, arguments

    def run(self, threads: int) -> str:
        self._call(*self._arguments)
        return ""

    def time(self, threads: int) -> tuple[str, list[float]]:
        begin = time.perf_counter()
        self._call(*self._arguments)
        return "", [time.perf_counter() - begin]
