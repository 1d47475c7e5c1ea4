"""How long launches take on a device."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .executable import capture_stream, capturing

#: Measurements, of which the median counts.
ROUNDS = 20
#: Launches of a CUDA graph that is timed, at least: it takes microseconds to begin.
_LEAST = 8


def seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one of the runs, each of which has run once already: they are alike but for their memory.

    On a GPU they are captured in a CUDA graph, in turn, as an evaluation's launches are.

    Raises:
        RuntimeError: something in them cannot be captured.
    """
    if device.type != "cuda":
        return statistics.median(map(_seconds, runs))
    runs = [*runs] * -(-_LEAST // len(runs))
    stream, graph = capture_stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with capturing(graph, stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.current_stream().synchronize()
    return 1e-3 * statistics.median(begin.elapsed_time(end) for begin, end in events) / len(runs)


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
