import pytest
import torch
from torch import nn

from cmfast.engine import CaptureError, capture

from .networks import KINDS, network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_graph_computes_what_the_network_does(kind):
    unet, inputs = network(kind)
    graph = capture(unet, inputs)
    graph.nodes.lint()
    torch.testing.assert_close(graph.run(*inputs), unet(*inputs), rtol=1e-5, atol=1e-5)


def test_every_parameter_is_read_by_its_name():
    unet, inputs = network("film")
    graph = capture(unet, inputs)
    read = {node.target for node in graph.nodes.nodes if node.op == "get_attr"}
    assert read == {name for name, _ in unet.named_parameters()}


def test_only_shapes_are_read():
    unet, inputs = network("film")
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    capture(unet, [torch.full_like(t, 3) for t in inputs])
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())


def test_half_precision_is_captured_as_float32():
    unet, inputs = network("film")
    graph = capture(unet.bfloat16(), [inputs[0].bfloat16(), *inputs[1:]])
    assert all(t.dtype == torch.float32 for t in graph.tensors.values())
    torch.testing.assert_close(graph.run(*inputs), unet.float()(*inputs).detach(), rtol=1e-5, atol=1e-5)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x)


def test_tensors_made_on_the_way_are_constants():
    scale = torch.tensor([2.0, 3.0])
    graph = capture(Lambda(lambda x: x * scale + torch.arange(2, device=x.device)), [torch.zeros(4, 2), None])
    assert torch.equal(graph.run(torch.ones(4, 2), None), torch.tensor([[2.0, 4.0]] * 4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "reads the values"),
        (lambda x: x.add_(1), "writes in place to what it is given"),
        (lambda x: x[x > 0], "reads the values"),
        (lambda x: x * x.tolist()[0], "reads the values"),
        (lambda x: x * x.sum().item(), "reads the values"),
        (lambda x: x + torch.randn(3), "draws random numbers, with aten.randn"),
        (lambda x: x + torch.rand_like(x), "draws random numbers, with aten.rand_like"),
        (lambda x: nn.functional.dropout(x, training=True), "draws random numbers"),
    ],
)
def test_what_cannot_be_captured_is_said(function, message):
    with pytest.raises(CaptureError, match=message):
        capture(Lambda(function), [torch.ones(3), None])


def test_the_networks_own_errors_come_through():
    unet, inputs = network("film")
    with pytest.raises(ValueError, match="multiples of 2"):
        capture(unet, [torch.zeros(2, 1, 8, 7), *inputs[1:]])


def test_the_networks_own_words_on_meta_come_through():
    def function(x):
        raise RuntimeError("the metadata of this picture is missing")

    with pytest.raises(RuntimeError, match="metadata of this picture") as caught:
        capture(Lambda(function), [torch.ones(3), None])
    assert not isinstance(caught.value, CaptureError)


def test_attention_without_dropout_is_not_random():
    q = torch.randn(1, 2, 5, 8)
    graph = capture(Lambda(lambda x: nn.functional.scaled_dot_product_attention(x, x, x)), [q, None])
    expected = nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(graph.run(q, None), expected, rtol=1e-5, atol=1e-5)


def test_what_nothing_reads_is_left_out():
    def function(x):
        torch.tanh(x)
        return x * 2

    graph = capture(Lambda(function), [torch.ones(3), None])
    assert [str(node.target) for node in graph.nodes.nodes if node.op == "call_function"] == ["aten.mul.Tensor"]


def test_graphs_of_calls_by_name():
    graph = capture(Lambda(lambda x: x * 2), [], {"x": torch.ones(3), "t": None})
    assert torch.equal(graph.run(torch.ones(3)), torch.full((3,), 2.0))
