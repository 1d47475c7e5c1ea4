import torch
from cmfast.kernels.conv_forms import ConvForm as Form
from torch import nn

from cmfast.engine import capture
from cmfast.engine.cpu.tuning import _describe
from cmfast.engine.cpu.weights import Weights
from cmfast.engine.graph import CONV, change
from cmfast.engine.passes import PASSES

DIRECT = Form(1, False, torch.float32)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x, other=None):
        return self.b(self.a(x)) + self.b(self.a(2 * x))


def graph_of(module, *inputs):
    graph = capture(module, inputs)
    PASSES["convolutions"](graph)
    return graph


def test_each_weight_is_packed_once():
    net, weights, asked, done = Two().eval(), Weights(), [], []
    for size in (8, 5):
        graph = graph_of(net, torch.zeros(1, 4, size, size))
        count = weights.prepare(graph, lambda node: asked.append(node) or DIRECT, done=done.append)
        assert count == (2 if size == 8 else 0)
    assert len(asked) == 2  # a weight keeps its form
    assert sorted(weights.packed) == ["a.weight: direct, float32", "b.weight: direct, float32"]
    assert set(done) == {"a.weight", "b.weight"}


def test_layers_of_other_times_are_measured_apart():
    x = torch.zeros(1, 4, 8, 8)
    graph = graph_of(Two().eval(), x)
    node, *_ = graph.calls(CONV)
    found = {_describe(node, torch.float32), _describe(node, torch.bfloat16)}
    given = next(n for n in graph.nodes.nodes if n.op == "placeholder")
    smaller = graph.call(node, torch.ops.aten.slice.Tensor, given, 1, 0, 2)
    options = [
        {"skip": given},
        {"skip": smaller},
        {"silu": True},
        {"relu": True},
        {"moments": True},
        {"stride": (2, 2)},
        {"padding": (0, 0, 0, 0)},
    ]
    options += [{"resample": "nearest"}, {"residual": given}, {"gain": given, "offset": given}]
    before = dict(node.kwargs)
    for option in options:
        change(node, **option)
        found.add(_describe(node, torch.float32))
        node.kwargs = before
    assert len(found) == 2 + len(options)
