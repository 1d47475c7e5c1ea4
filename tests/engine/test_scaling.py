"""Numbers after a convolution or a linear layer are part of its weights."""

import pytest
import torch
from torch import nn

from cmfast.engine import Accelerator, capture
from cmfast.engine.graph import CONV
from cmfast.engine.passes import PASSES

from .test_convolutions import Layers, accelerated, relative


def conv(bias=True):
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, padding=1, bias=bias)


IMAGES = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))

FOLDED = {
    "decoder": lambda m, x: m.conv(x).mul(2).sub(1),
    "times": lambda m, x: 0.25 * m.conv(x),
    "over": lambda m, x: m.conv(x) / 3,
    "plus": lambda m, x: m.conv(x) + 0.5,
    "plus-alpha": lambda m, x: torch.add(m.conv(x), 0.5, alpha=3),
    "minus-alpha": lambda m, x: torch.sub(m.conv(x), 0.5, alpha=3),
    "from": lambda m, x: 1 - m.conv(x),
    "from-alpha": lambda m, x: torch.rsub(m.conv(x), 1, alpha=2),
    "negative": lambda m, x: -m.conv(x),
    "then-added": lambda m, x: x.mean(1, keepdim=True) + 2 * m.conv(x),
    "then-relu": lambda m, x: torch.relu(m.conv(x) * -2),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FOLDED)
def test_numbers_are_in_the_weights(name, bias):
    module = Layers(FOLDED[name], conv=conv(bias))
    found, left, convs = accelerated(module, IMAGES)
    assert relative(found, module, IMAGES) < 1e-6
    assert len(convs) == 1
    assert {step.operator for step in left} <= {"aten.mean.dim", "aten.add.Tensor"}


def test_layers_of_other_widths_have_their_own_biases():
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 8, 1, bias=False), "last": nn.Conv2d(8, 5, 1, bias=False)}
    module = Layers(lambda m, x: m.last(m.first(x) + 0.5) + 0.5, **layers)
    found, left, convs = accelerated(module, IMAGES)
    assert relative(found, module, IMAGES) < 1e-6
    assert (len(left), len(convs)) == (0, 2)


KEPT = {
    "zero": lambda m, x: m.conv(x) * 0,  # not a number stays one
    "large": lambda m, x: m.conv(x) * 17,  # in float16 weights would not be exact, or be infinite
    "small": lambda m, x: m.conv(x) / 17,
    "infinite": lambda m, x: m.conv(x) * float("inf"),
    "plus infinity": lambda m, x: m.conv(x) + float("inf"),
    "a tensor": lambda m, x: m.conv(x) * x[:, :1],
    "another user": lambda m, x: (lambda y: (y * 2) * y)(m.conv(x)),
    "after relu": lambda m, x: torch.relu(m.conv(x)) * 2,
}


@pytest.mark.parametrize("name", KEPT)
def test_others_stay(name):
    graph = capture(Layers(KEPT[name], conv=conv()).eval(), [IMAGES])
    for rewrite in PASSES.values():
        rewrite(graph)
        if rewrite is PASSES["convolutions"]:
            assert len(list(graph.calls(CONV))) == 1
            assert PASSES["scaling"](graph) == 0


def test_changed_weights_are_scaled_too():
    module = Layers(FOLDED["decoder"], conv=conv()).eval()
    fast = Accelerator(module, torch.float32)
    fast(IMAGES)
    with torch.no_grad():
        module.conv.weight.mul_(3)
        module.conv.bias.add_(1)
    assert relative(fast(IMAGES), module, IMAGES) < 1e-6


def test_networks_that_differ_in_a_number_share_no_packed_weights(tmp_path):
    for factor in (2, 3):
        module = Layers(lambda m, x, factor=factor: m.conv(x) * factor, conv=conv()).eval()
        assert relative(Accelerator(module, torch.float32, cache=tmp_path)(IMAGES), module, IMAGES) < 1e-6
