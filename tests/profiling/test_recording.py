"""What is recorded of a call, and how on a GPU, with stand-ins for what torch.cuda has."""

import dataclasses

import pytest
import torch
from torch import nn

from cmfast.profiling import recording
from cmfast.profiling.recording import record

from ..engine.cuda.stand_in import Cuda

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.SiLU())

    def forward(self, x):
        return self.blocks(x) + 1


def names(net):
    return {module: name for name, module in net.named_modules()}


@torch.no_grad()
def test_operators_are_recorded_in_order_with_their_layers_and_times():
    net, x = Net(), torch.ones(3, 4)
    found = record(lambda: net(x), names(net), CPU)
    operators = [o for o in found.operations if o.bytes]
    assert [(o.operator, o.layer, o.operations) for o in operators] == [
        ("aten.addmm", "blocks.0", 2 * 3 * 4 * 4),
        ("aten.silu", "blocks.1", 0),
        ("aten.add.Tensor", "", 0),
    ]
    assert operators[0].products == torch.float32
    ends = [0.0]
    for operation in found.operations:
        assert ends[-1] <= operation.begin
        assert operation.seconds > 0
        ends.append(operation.begin + operation.seconds)
    assert ends[-1] < found.seconds
    assert (found.in_programs, found.whole) == (0.0, False)


@torch.no_grad()
def test_on_a_gpu_seconds_are_those_between_events_and_ranges_have_the_names(monkeypatch):
    net, x = Net(), torch.ones(3, 4)
    earlier = record(lambda: net(x), names(net), CPU)
    cuda = Cuda([])
    cuda.install(monkeypatch)
    found = record(lambda: net(x), names(net), torch.device("cuda"), like=earlier)
    assert [(o.begin, o.seconds) for o in found.operations] == [(2.0 * i + 1.0, 1.0) for i in range(4)]
    assert cuda.log[:2] == ["wait", "sleep"]
    pushed = [entry.removeprefix("push ") for entry in cuda.log if entry.startswith("push ")]
    assert [name for name in pushed if name != "aten.t"] == [
        "blocks", "blocks.0", "aten.addmm", "blocks.1", "aten.silu", "aten.add.Tensor"
    ]  # fmt: skip
    assert cuda.log.count("pop") == len(pushed)
    assert cuda.log[-1] == "pop" or cuda.log[-2:] == ["pop", "wait"]


@torch.no_grad()
def test_what_an_earlier_recording_says_is_not_found_out_again(monkeypatch):
    net, x = Net(), torch.ones(3, 4)
    describe, calls = recording._describe_call, []
    monkeypatch.setattr(recording, "_describe_call", lambda *args: calls.append(args[0]) or describe(*args))
    earlier = record(lambda: net(x), names(net), CPU)
    assert len(calls) == 4
    before = [operation.begin for operation in earlier.operations]
    found = record(lambda: net(x), names(net), CPU, like=earlier)
    assert len(calls) == 4
    assert [dataclasses.replace(o, begin=0, seconds=0) for o in found.operations] == [
        dataclasses.replace(o, begin=0, seconds=0) for o in earlier.operations
    ]
    assert [operation.begin for operation in earlier.operations] == before
    other = record(lambda: torch.tanh(net(x)), names(net), CPU, like=earlier)
    assert calls[4:] == [torch.ops.aten.tanh.default]
    assert other.operations[-1].operator == "aten.tanh"


@torch.no_grad()
def test_an_error_leaves_no_range_open(monkeypatch):
    cuda = Cuda([])
    cuda.install(monkeypatch)
    net = Net()
    with pytest.raises(RuntimeError, match="shapes"):
        record(lambda: net(torch.ones(3, 5)), names(net), torch.device("cuda"))
    assert cuda.log.count("pop") == sum(entry.startswith("push ") for entry in cuda.log)
