"""Steps with their memory on a GPU: what runs, captured in a CUDA graph."""

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import arena
from ..nvtx import ranges
from ..steps import Steps, StepTime, Timed

_log = logging.getLogger(__name__)

#: Bytes that addresses of values are a multiple of, as those that the CUDA allocator gives are.
ALIGNMENT = 256
#: Cycles of a GPU's clock, for a step, that its work waits while the steps are enqueued: 20 us and more.
_HEAD_START = 40_000
#: One thread captures at a time: torch empties the allocator's cache before it does. Taken before an executable's turn.
capture_lock = threading.RLock()
#: Whether this thread is within `capturing`.
_thread = threading.local()


@functools.cache
def capture_stream(device: torch.device) -> "torch.cuda.Stream":
    """The stream on which a device's graphs are captured, under `capture_lock`.

    One for all: torch's streams come from a pool, and a new one each time would soon be one that another thread has as
    its current stream, whose launches would be captured as well.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def capturing(graph: "torch.cuda.CUDAGraph", stream: "torch.cuda.Stream") -> Iterator[None]:
    """Within the block, launches on the stream are captured; other threads may use the device meanwhile.

    They may not wait for the whole device (`torch.cuda.synchronize`), which CUDA forbids while anything is captured.
    Where a capture fails, torch leaves its stream the current one, and the allocator in the capture: both are mended.
    """
    with capture_lock:
        before = torch.cuda.current_stream()
        # cuBLAS' workspace is kept for each stream: here of the graph's own memory, and of no other graph's.
        torch._C._cuda_clearCublasWorkspaces()
        _thread.captures = True
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                yield
        except RuntimeError:
            with contextlib.suppress(Exception):  # nothing was left of the capture, or it had not begun
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), graph.pool())
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            _thread.captures = False
            torch.cuda.set_stream(before)


#: Those whose launches are in graphs that callers captured: their memory must last as long as these, however long.
_in_callers_graphs: "set[Executable]" = set()


class Executable:
    """A network evaluation at one shape of its inputs.

    Several threads may call it, on any streams: one evaluation at a time has its memory. Inputs are copied to where
    the launches read them. Calls return before the GPU is done, as those of torch do. Under a stream capture of the
    caller's, the launches become a part of what is captured; then the caller orders its replays and other calls.

    Attributes:
        steps: what it does.
        rewrites: how many times each pass rewrote the graph.
        bytes: size of the memory of all its values.
        dtypes: those of the outputs, as the graph has them.
    """

    def __init__(
        self,
        steps: Steps,
        rewrites: Mapping[str, int],
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        *,
        graphs: bool = True,
    ) -> None:
        self.steps = steps
        self.rewrites = dict(rewrites)
        self.dtypes = list(dtypes)
        self._device = device
        self._graphs = graphs and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._last: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()
        self._streams: set[int] = set()  # on which it has run
        values, counters = (arena.plan(buffers, ALIGNMENT) for buffers in (steps.buffers, steps.counters))
        self.bytes = values + counters
        self._values = torch.empty(values, dtype=torch.uint8, device=device)
        self._counters = torch.zeros(counters, dtype=torch.uint8, device=device)
        self._counts = set(steps.counters)
        self._inputs = self._real(steps.inputs)
        self._outputs = self._real(steps.outputs)
        self._calls = [(step.call, self._real(step.arguments)) for step in steps.steps]

    def _real(self, values: Any) -> Any:
        """Values with their place in memory."""

        def place(t: Tensor) -> Tensor:
            if not t.is_meta:
                return t
            buffer = self.steps.buffer(t)
            return arena.view(self._counters if buffer in self._counts else self._values, buffer, t)

        return pytree.tree_map_only(Tensor, place, values)

    def __call__(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
        """Evaluate; outputs are contiguous tensors of the dtypes, by default those of the graph."""
        captures = self._graphs and self._graph is None
        with capture_lock if captures else contextlib.nullcontext(), self.turn():
            self._run(inputs)
            return self._give(dtypes)

    def time(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> Timed:
        """Evaluate in the same way without a CUDA graph, and take the time of each step.

        On a GPU each step is an NVTX range of its operator's name, within those of its module and of the modules that
        this is a part of.
        """
        with self.turn(), ranges(self._device) as named:
            clock = self._clock(inputs)
            self._fill(inputs)
            clock.tick()
            for step, (call, given) in zip(self.steps.steps, self._calls, strict=True):
                with named.operator(step.layer, step.operator):
                    call(*given)
                clock.tick()
            outputs = self._give(dtypes)
            clock.tick()
            filling, *seconds, giving = clock.seconds()
        return Timed(outputs, filling, list(map(StepTime, self.steps.steps, seconds)), giving)

    def _clock(self, inputs: Sequence[Tensor]) -> "_Clock | _GpuClock":
        """What takes the time of steps that are about to run."""
        if self._device.type != "cuda":
            return _Clock()
        self._launch(inputs)  # compiles what is not compiled yet
        # The GPU waits until the steps are enqueued, so that none waits for its launch.
        torch.cuda._sleep(_HEAD_START * len(self._calls))
        return _GpuClock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block the memory is the caller's alone: for one who captured the launches, and replays them."""
        with self._lock, self._in_turn():
            yield

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Within the block, the device is current, and its stream comes after the one that ran the last evaluation."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():  # the order is that of the caller's replays
                if not getattr(_thread, "captures", False):  # a replay keeps what it captures, as long as it lives
                    _in_callers_graphs.add(self)
                yield
                return
            stream = torch.cuda.current_stream()
            if self._done is not None and stream != self._last:
                stream.wait_event(self._done)
            if stream.cuda_stream not in self._streams:
                self._use_on(stream)
            try:
                yield
            finally:
                self._last, self._done = stream, self._done or torch.cuda.Event()
                self._done.record(stream)

    def _use_on(self, stream: "torch.cuda.Stream") -> None:
        """Have the allocator wait for a stream before it gives the memory away, once nothing here needs it any more."""
        self._streams.add(stream.cuda_stream)
        read = [t for t in pytree.tree_leaves([given for _, given in self._calls]) if isinstance(t, Tensor)]
        for t in {t.untyped_storage().data_ptr(): t for t in (self._values, self._counters, *read)}.values():
            if t.is_cuda:
                t.record_stream(stream)

    def _run(self, inputs: Sequence[Tensor]) -> None:
        if self._graphs and not torch.cuda.is_current_stream_capturing():
            if self._graph is None:
                self._graph = self._capture(inputs)
            if self._graph is not None:
                self._fill(inputs)
                self._graph.replay()
                return
        self._launch(inputs)

    def _fill(self, inputs: Sequence[Tensor]) -> None:
        """Put the inputs in their places, where other values lie once they have been read."""
        for slot, given in zip(self._inputs, inputs, strict=True):
            slot.copy_(given)

    def _give(self, dtypes: Sequence[torch.dtype] | None) -> list[Tensor]:
        wanted = zip(self._outputs, self.dtypes if dtypes is None else dtypes, strict=True)
        return [torch.empty(t.shape, dtype=dtype, device=t.device).copy_(t) for t, dtype in wanted]

    def launch(self) -> None:
        """Run the steps on the inputs that are in their places: for one who measures them, alone."""
        for call, given in self._calls:
            call(*given)

    def _launch(self, inputs: Sequence[Tensor]) -> None:
        self._fill(inputs)
        self.launch()

    def _capture(self, inputs: Sequence[Tensor]) -> "torch.cuda.CUDAGraph | None":
        """The launches as a CUDA graph; None, from then on, where something in them cannot be captured."""
        stream = capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries prepared before the capture
            self._launch(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, stream):
                self.launch()
        except RuntimeError as error:
            self._graphs = False
            _log.warning("an evaluation is not captured in a CUDA graph, and launched step by step: %s", error)
            return None
        return graph


class _Clock:
    """Takes the time now and at each tick."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def tick(self) -> None:
        self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each tick and the one before."""
        return [b - a for a, b in itertools.pairwise(self._times)]


class _GpuClock:
    """The same of a GPU's current stream."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self.tick()

    def tick(self) -> None:
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def seconds(self) -> list[float]:
        """Between each tick and the one before, once the GPU has come to the last."""
        self._events[-1].synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(self._events)]
