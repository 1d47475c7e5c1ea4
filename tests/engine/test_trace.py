"""What a trace notes of the programs that run."""

import time

import pytest
import torch
from torch import nn

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
    assert [run.inputs[0].shape[0] for run in found.runs] == [2, 1]
    assert all(run.module is fast for run in found.runs)
    assert all(run.seconds > 0 for run in found.runs)
    assert sum(run.seconds for run in found.runs) < took
    assert not found.left
    assert not trace.is_on()


@pytest.mark.parametrize(("device", "waits"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_a_gpu_is_waited_for(monkeypatch, device, waits):
    found = []
    monkeypatch.setattr(torch.cuda, "synchronize", found.append)
    trace.synchronize(torch.device(device))
    assert found == waits
