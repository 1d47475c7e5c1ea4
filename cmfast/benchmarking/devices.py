"""How a call is timed: on the CPU by the clock around many calls, on a GPU by events around a graph's replay."""

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

ROUNDS = 20
#: Seconds of a turn on the CPU, at least: many calls of a short one.
TURN = 4e-3
#: Seconds of a call up to which a turn begins with one that is not timed: what ran before has taken the caches.
SHORT = 0.05
#: Bytes of the last cache where the system does not say.
_CACHE = 32 << 20


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of a call, all in one unit: the median and the quartiles of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Sequence[float]) -> "Times":
        """Those of measurements; of a single one, three times the same."""
        if len(found) < 2:
            return cls(found[0], found[0], found[0])
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return cls(*(float(f"{x:.4g}") for x in (median, low, high)))


class Position:
    """Which buffers come next, for all whose turns use the same ones: what one has just touched is not the next's."""

    def __init__(self) -> None:
        self.next = 0


class Timer(Protocol):
    """Measures one call, over several buffers."""

    def turn(self) -> float:
        """Mean seconds of a call, of several calls now."""


class Device(Protocol):
    """What is measured on.

    Attributes:
        name: torch's.
        cache_bytes: the size of its last cache.
    """

    name: str

    @property
    def cache_bytes(self) -> int:
        """The size of the last cache."""

    def timer(self, runs: Sequence[Callable[[], Any]], position: Position) -> Timer:
        """What times the runs in turn: the same call, each with buffers of its own."""

    def clock(self, run: Callable[[], Any]) -> Timer:
        """What times a whole call as the host sees it: from Python until its result is there."""

    def synchronize(self) -> None:
        """Wait for what was launched."""

    def free(self) -> None:
        """Give back memory that is not used any more."""


class Cpu:
    """The processor, with torch's number of threads."""

    name = "cpu"

    @property
    def cache_bytes(self) -> int:
        """The size of the largest cache."""
        found = []
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = path.read_text().strip()
            found.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
        return max(found, default=_CACHE)

    def timer(self, runs: Sequence[Callable[[], Any]], position: Position) -> Timer:
        """By the clock around as many calls as take TURN; a turn of calls below SHORT begins with one untimed."""
        return _Clock(runs, position)

    def clock(self, run: Callable[[], Any]) -> Timer:
        """The same of one call on its own buffers."""
        return _Clock([run], Position())

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def free(self) -> None:
        """Nothing to do."""


class _Clock:
    def __init__(
        self, runs: Sequence[Callable[[], Any]], position: Position, wait: Callable[[], None] = lambda: None
    ) -> None:
        self.runs, self.position, self.wait = runs, position, wait
        self.calls, self.untimed = 1, 0
        self.turn()
        seconds = self.turn()
        self.calls, self.untimed = max(1, round(TURN / max(seconds, 1e-7))), int(seconds < SHORT)

    def turn(self) -> float:
        first, count = self.position.next, len(self.runs)
        turn = [self.runs[(first + i) % count] for i in range(self.untimed + self.calls)]
        self.position.next += len(turn)
        for run in turn[: self.untimed]:
            run()
        self.wait()
        start = time.perf_counter()
        for run in turn[self.untimed :]:
            run()
            self.wait()
        return (time.perf_counter() - start) / self.calls


class Gpu:
    """An NVIDIA GPU: torch's current one."""

    name = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.stream = torch.cuda.Stream()
        torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32, which is not torch's default

    @property
    def cache_bytes(self) -> int:
        """The size of the L2 cache."""
        return self.properties.L2_cache_size

    def timer(self, runs: Sequence[Callable[[], Any]], position: Position) -> Timer:
        """By events around the replay of one CUDA graph of all the runs."""
        return _Replay(runs, self.stream)

    def clock(self, run: Callable[[], Any]) -> Timer:
        """By the clock, waiting for the GPU after each call."""
        return _Clock([run], Position(), torch.cuda.synchronize)

    def replayed(self, calls: Sequence[Callable[[], Any]]) -> Times:
        """Microseconds of a call where all of them are one CUDA graph, replayed."""
        graph = _Replay(calls, self.stream)
        events = [graph.record() for _ in range(ROUNDS)]
        torch.cuda.synchronize()
        return Times.of([1e3 * start.elapsed_time(end) / len(calls) for start, end in events])

    def called(self, call: Callable[[], Any], rounds: int = ROUNDS) -> Times:
        """A call's microseconds as the host sees it: from Python until its result is there."""
        call()
        found = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            found.append(1e6 * (time.perf_counter() - start))
        return Times.of(found)

    def launches(self, call: Callable[[], Any], trace: Path | None = None) -> dict[str, int]:
        """How often a call launches each kernel (and copies, and clears); the profiler's trace goes to a file."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            torch.cuda.synchronize()
        if trace:
            profiler.export_chrome_trace(str(trace))
        on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
        return dict(collections.Counter(event.name for event in on_device).most_common())

    def peak_memory(self, call: Callable[[], Any]) -> int:
        """Bytes that are allocated at most during a call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what is not used any more."""
        torch.cuda.empty_cache()


class _Replay:
    def __init__(self, runs: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> None:
        self.count = len(runs)
        runs[0]()
        runs[-1]()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for run in runs:
                run()
        for _ in range(3):
            self.graph.replay()

    def record(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Replay once; the events before and after it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def turn(self) -> float:
        start, end = self.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.count


def device_of(name: str) -> Device:
    """The device by torch's name, "cpu" or "cuda"."""
    return Gpu() if torch.device(name).type == "cuda" else Cpu()


def computes_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are computed there, not emulated."""
    return device == "cuda" or torch.cpu._is_avx512_bf16_supported()  # get_cpu_capability says AVX512 of both kinds
