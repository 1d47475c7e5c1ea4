"""What a trace notes of the programs that run."""

import time
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.engine import trace


@torch.no_grad()
def test_runs_are_noted_with_their_seconds():
    net, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 6, 6)
    fast = cmfast.accelerate(net)
    fast(x)
    assert not trace.is_on()
    begin = time.perf_counter()
    with trace.tracing() as found:
        assert trace.is_on()
        fast(x)
        fast(x[:1])
    took = time.perf_counter() - begin
    assert [run.executable.steps.inputs[0].shape[0] for run in found.runs] == [2, 1]
    assert begin < found.runs[0].begin < found.runs[0].begin + found.runs[0].seconds < found.runs[1].begin
    assert all(run.timed is None for run in found.runs)
    assert all(run.module is fast for run in found.runs)
    assert all(run.seconds > 0 for run in found.runs)
    assert sum(run.seconds for run in found.runs) < took
    assert not found.left
    assert not trace.is_on()


@torch.no_grad()
def test_steps_are_timed_where_that_is_asked_for_and_nothing_else_sees_what_torch_does_in_them():
    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).eval(), torch.randn(2, 3, 6, 6)
    fast, seen = cmfast.accelerate(net), []
    expected = fast(x)
    with trace.tracing(steps_timed=True) as found, Noting():
        outputs = fast(x)
    (run,) = found.runs
    assert outputs.equal(expected)
    assert [timed.step.operator for timed in run.timed.steps] == ["conv2d", "aten.tanh"]
    assert 0 < sum(timed.seconds for timed in run.timed.steps) < run.seconds
    assert run.timed.outputs == []
    assert not seen


@pytest.mark.parametrize(("device", "waits"), [("cpu", []), ("cuda:1", [torch.device("cuda:1"), "wait"])])
def test_a_gpu_is_waited_for(monkeypatch, device, waits):
    """Its current stream alone: another thread's capture may not be disturbed."""
    found = []
    stream = types.SimpleNamespace(synchronize=lambda: found.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.append(device) or stream)
    trace.synchronize(torch.device(device))
    assert found == waits
