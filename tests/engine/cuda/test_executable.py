"""What runs on a GPU, with stand-ins for torch.cuda's streams, events and graphs that note what is asked of them."""

import contextlib

import pytest
import torch

from cmfast.engine.cuda.executable import ALIGNMENT, Executable
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

    for name in "ab":
        out = steps.row(3)
        steps.add(Step(name, "double", double, (out, x)))
        x = out
    steps.want([x])
    return steps


class Cuda:
    """Stand-ins; `log` is what was asked of them in order."""

    def __init__(self, log):
        self.log, self.current, self.capturing, self.broken, self.count = log, "first", False, False, 0
        self.launch = None

    def install(self, monkeypatch):
        cuda = self

        class Stream:
            def __init__(self):
                self.name = "side"

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

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
            yield
            if cuda.broken:
                raise RuntimeError("operation not permitted when stream is capturing")
            cuda.log[begin:] = ["capture"]
            made.launch = cuda.launch

        @contextlib.contextmanager
        def stream(s):
            cuda.log.append(f"on {s.name}")
            yield

        @contextlib.contextmanager
        def device(d):
            yield

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: named(self.current))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("sleep"))
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream, "device": device
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch):
    stand_in = Cuda([])
    stand_in.install(monkeypatch)
    return stand_in


def executable(cuda, **options):
    """Steps whose memory is on the CPU and that are run as on a GPU."""
    made = Executable(doubling(cuda.log), {}, [torch.float32], torch.device("cpu"), graphs=False)
    made._device, made._graphs = torch.device("cuda:1"), options.get("graphs", True)
    cuda.launch = lambda: [call(*given) for call, given in made._calls]
    return made


X = torch.tensor([1.0, 2.0, 3.0])
CAPTURED = ["side waits for first", "on side", "launch", "launch", "first waits for side", "capture"]


def test_the_first_call_captures_and_all_replay(cuda):
    made = executable(cuda)
    assert made.steps.buffers[0].offset == made.steps.buffers[2].offset  # the input is overwritten
    assert made([X])[0].equal(4 * X)
    assert cuda.log == [*CAPTURED, "replay"]
    cuda.log.clear()
    assert made([-X])[0].equal(-4 * X)
    assert cuda.log == ["replay"]


def test_without_graphs_the_steps_are_launched(cuda):
    made = executable(cuda, graphs=False)
    for _ in range(2):
        assert made([X])[0].equal(4 * X)
    assert cuda.log == ["launch"] * 4


def test_what_cannot_be_captured_is_launched(cuda, caplog):
    cuda.broken = True
    made = executable(cuda)
    for _ in range(2):
        assert made([X])[0].equal(4 * X)
    assert cuda.log.count("replay") == 0
    assert "launched step by step: operation not permitted" in caplog.text
    assert len(caplog.records) == 1


def test_another_stream_waits_for_the_last_evaluation(cuda):
    made = executable(cuda)
    made([X])
    cuda.log.clear()
    made([X])
    cuda.current = "second"
    made([X])
    made([X])
    assert cuda.log == ["replay", "second waits for an event of first", "replay", "replay"]


def test_within_a_capture_of_the_callers_the_steps_are_launched(cuda):
    made = executable(cuda)
    made([X])
    cuda.log.clear()
    cuda.capturing, cuda.current = True, "callers"
    assert made([X])[0].equal(4 * X)
    assert cuda.log == ["launch"] * 2


def test_steps_are_timed_between_events(cuda):
    made = executable(cuda)
    times = made.time([X])
    assert [(timed.step.name, timed.seconds) for timed in times] == [("a", 1.0), ("b", 1.0)]
    assert cuda.log == ["launch", "launch", "sleep", "launch", "launch"]  # what is measured was compiled before


def test_values_lie_apart_and_outputs_have_the_dtypes_asked_for():
    made = Executable(doubling(), {}, [torch.float32], torch.device("cpu"))
    assert all(buffer.offset % ALIGNMENT == 0 for buffer in made.steps.buffers)
    assert made.bytes == 2 * ALIGNMENT
    (out,), (half,) = made([X]), made([X], [torch.float16])
    assert (out.dtype, half.dtype) == (torch.float32, torch.float16)
    assert out.equal(4 * X)
    assert half.equal(4 * X.half())
