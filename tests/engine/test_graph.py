import torch
from torch import nn

from cmfast.engine import capture
from cmfast.engine.passes import PASSES

META = torch.device("meta")


class Constants(nn.Module):
    """Tensors that are made in every way, on the device of the input or without one."""

    def __init__(self):
        super().__init__()
        self.scale, self.plain = nn.Parameter(torch.ones(4)), torch.arange(4.0)

    def forward(self, x):
        made = torch.arange(4) * self.scale + torch.tensor([1.0, 2, 3, 4], device=x.device) + self.plain
        return x * made + torch.zeros(4, device=x.device) + torch.full_like(x, 2) + torch.linspace(0, 1, 4)


def test_a_graph_moves_with_all_that_it_makes():
    x = torch.randn(2, 4)
    graph = capture(Constants(), [x])
    torch.testing.assert_close(graph.run(x), Constants()(x))
    graph.move(META)
    assert all(tensor.device == META for tensor in graph.tensors.values())
    for rewrite in PASSES.values():
        rewrite(graph)  # computes what is made of constants, all on one device
    assert all(tensor.device == META for tensor in graph.tensors.values())
    assert graph.run(x.to(META)).device == META


def test_a_constant_is_one_value_however_often_it_is_read():
    class Twice(nn.Module):
        plain = torch.arange(4.0)

        def forward(self, x):
            return x + self.plain, x * self.plain

    graph = capture(Twice(), [torch.zeros(4)])
    assert len([node for node in graph.nodes.nodes if node.op == "get_attr"]) == 1


def test_a_view_is_of_values_that_lie_in_any_way():
    class Tokens(nn.Module):
        def forward(self, x):
            return (x * 2).flatten(1).view(2, 3, 4, 5)

    graph = capture(Tokens(), [torch.randn(2, 3, 4, 5)])
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(graph.run(x), 2 * x)
