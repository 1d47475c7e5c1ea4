"""What differs between a GPU and the dry run on a CPU: where tensors are, a call's time, its launches and its memory.

Everything else in the stages is the same for both, except the sizes (`calls.py`, `network.py`).
"""

import collections
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of a call: the median and the quartiles of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Sequence[float]) -> "Times":
        """Those of microseconds that were measured, of which there are two at least."""
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return cls(*(float(f"{x:.4g}") for x in (median, low, high)))


class Gpu:
    """An NVIDIA GPU."""

    emulated = False
    name = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.stream = torch.cuda.Stream()

    @property
    def cache_bytes(self) -> int:
        """The size of the L2 cache."""
        return self.properties.L2_cache_size

    def refusal(self, backend: str) -> str:
        """Why nothing can be asked of the backend here, or nothing."""
        return ""

    def is_broken(self) -> bool:
        """Whether an error of the device has ended this process's use of it."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def replayed(self, calls: Sequence[Callable]) -> Times:
        """A call's time where all of them are one CUDA graph, replayed."""
        calls[0]()
        calls[-1]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
        for start, end in events:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return Times.of([1e3 * start.elapsed_time(end) / len(calls) for start, end in events])

    def called(self, call: Callable, rounds: int = ROUNDS) -> Times:
        """A call's time as the host sees it: from Python until its result is there."""
        call()
        found = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            found.append(1e6 * (time.perf_counter() - start))
        return Times.of(found)

    def launches(self, call: Callable, trace: Path | None = None) -> dict[str, int]:
        """How often a call launches each kernel (and copies, and clears); the profiler's trace goes to a file."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            torch.cuda.synchronize()
        if trace:
            profiler.export_chrome_trace(str(trace))
        on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return dict(collections.Counter(event.name for event in on_device).most_common())

    def peak_memory(self, call: Callable) -> int:
        """Bytes that are allocated at most during a call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def free(self) -> None:
        """Give back what is not used any more."""
        torch.cuda.empty_cache()


class Emulated:
    """The CPU, on which Triton's interpreter and csrc/emulation take the launches. Its times say nothing of a GPU."""

    emulated = True
    name = "cpu"
    cache_bytes = 1 << 16

    def __init__(self, missing: str) -> None:
        self.missing = missing

    def refusal(self, backend: str) -> str:
        """Why nothing can be asked of the backend here, or nothing."""
        return self.missing if backend == "cuda" else ""

    def is_broken(self) -> bool:
        """Never."""
        return False

    def replayed(self, calls: Sequence[Callable]) -> Times:
        """The time of the first of the calls."""
        return self.called(calls[0])

    def called(self, call: Callable, rounds: int = 1) -> Times:
        """The call's time, once."""
        start = time.perf_counter()
        call()
        return Times.of([1e6 * (time.perf_counter() - start)] * 2)

    def launches(self, call: Callable, trace: Path | None = None) -> dict[str, int]:
        """How often a call asks for each operator that is no view."""
        with _Operators() as operators:
            call()
        if trace:
            trace.write_text("{}\n")
        return dict(operators.counts.most_common())

    def peak_memory(self, call: Callable) -> int:
        """Not known."""
        return 0

    def free(self) -> None:
        """Nothing to do."""


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not getattr(operator, "is_view", False):
            self.counts[str(operator)] += 1
        return operator(*args, **kwargs or {})


@contextlib.contextmanager
def chosen(emulate: bool) -> Iterator[Gpu | Emulated]:
    """The device that the stages measure, ready within the `with` block."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
    if not emulate:
        device = Gpu()
        with torch.cuda.stream(device.stream):
            yield device
        return
    os.environ |= {"TRITON_INTERPRET": "1", "CMFAST_GPU_ON_CPU": "1"}
    torch.set_num_threads(1)
    from cmfast.kernels import native
    from cmfast.kernels.triton import conv_config

    from tests.interpreter import make_faster
    from tests.kernels import emulation

    make_faster()
    conv_config.PROGRAMS = 2  # the interpreter runs them one by one
    missing = emulation.missing()
    with contextlib.nullcontext() if missing else native.stand_in(emulation.emulated()):
        yield Emulated(missing)
