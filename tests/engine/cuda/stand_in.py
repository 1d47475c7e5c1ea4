"""Stand-ins for torch.cuda's streams, events and graphs that note what is asked of them, and steps to run with them."""

import contextlib

import torch
from torch import fx

from cmfast.engine.cuda.executable import Executable, capture_stream
from cmfast.engine.steps import Step, Steps


def doubling(noted=None):
    """Steps that double a row, twice."""
    steps = Steps()
    steps.give(torch.empty(3), image=False)
    x = steps.inputs[0]

    def double(out, x):
        if noted is not None:
            noted.append("launch")
        torch.mul(x, 2, out=out)

    block = fx.Graph().placeholder("x")
    block.meta["layer"] = "a block"
    for name in "ab":
        out = steps.row(3)
        steps.add(Step(name, "double", double, (out, x), node=block))
        x = out
    steps.want([x])
    return steps


class Cuda:
    """Stand-ins; `log` is what was asked of them in order."""

    def __init__(self, log):
        self.log, self.current, self.capturing, self.broken, self.count = log, "first", False, False, 0
        self.launch = None
        self.workspaces = []  # entries of the log before which cuBLAS' memory was given back

    def install(self, monkeypatch):
        cuda = self

        class Stream:
            def __init__(self, device=None):
                self.name = "side"

            @property
            def cuda_stream(self):
                return hash(self.name)

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

            def synchronize(self):
                cuda.log.append("wait")

            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits for an event of {event.stream}")

            def __eq__(self, other):
                return other is not None and self.name == other.name

            __hash__ = None

        def named(name):
            stream = Stream()
            stream.name = name
            return stream

        class Event:
            def __init__(self, enable_timing=False):
                pass

            def record(self, stream=None):
                cuda.count += 1
                self.at = cuda.count
                self.stream = stream and stream.name

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1000.0 * (other.at - self.at)

        class CUDAGraph:
            def replay(self):
                begin = len(cuda.log)
                self.launch()
                cuda.log[begin:] = ["replay"]

        @contextlib.contextmanager
        def graph(made, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            begin = len(cuda.log)
            before, cuda.current, cuda.capturing = cuda.current, stream.name, True
            yield
            cuda.capturing = False
            if cuda.broken:  # torch leaves its stream the current one
                raise RuntimeError("operation not permitted when stream is capturing")
            cuda.current = before
            cuda.log[begin:] = ["capture"]
            made.launch = cuda.launch

        @contextlib.contextmanager
        def stream(s):
            cuda.log.append(f"on {s.name}")
            before, cuda.current = cuda.current, s.name
            yield
            cuda.current = before

        @contextlib.contextmanager
        def device(d):
            yield

        cleared = lambda: self.workspaces.append(len(self.log))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cleared, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: named(self.current))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))
        capture_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("sleep"))
        monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: self.log.append(f"push {name}"))
        monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: self.log.append("pop"))
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream, "device": device
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def executable(cuda, **options):
    """Steps whose memory is on the CPU and that are run as on a GPU."""
    made = Executable(doubling(cuda.log), {}, [torch.float32], torch.device("cpu"), graphs=False)
    made._device, made._graphs = torch.device("cuda:1"), options.get("graphs", True)
    cuda.launch = lambda: [call(*given) for call, given in made._calls]
    return made
