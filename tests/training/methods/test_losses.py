import math
import sys
import types

import pytest
import torch

from cmfast.training.methods.losses import distance, l2, pseudo_huber

from .toy import IMAGES, NOISE, images

OTHERS = torch.tensor(NOISE, dtype=torch.float64).reshape(3, 1, 2, 2)


def squares():
    return [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(IMAGES, NOISE, strict=True)]


def test_l2_is_the_mean_square():
    assert l2(images(), OTHERS).tolist() == pytest.approx([s / 4 for s in squares()], rel=1e-12)
    assert torch.equal(distance("l2", 0.5)(images(), OTHERS), l2(images(), OTHERS))


@pytest.mark.parametrize("c", [0.00054, 0.3])
def test_pseudo_huber_is_that_of_the_paper(c):
    """Song and Dhariwal 2023, equation 7, with c in units of √d."""
    expected = [math.sqrt(s + (c * 2) ** 2) - c * 2 for s in squares()]
    assert pseudo_huber(images(), OTHERS, c).tolist() == pytest.approx(expected, rel=1e-12)
    assert distance("pseudo-huber", c)(images(), OTHERS).tolist() == pytest.approx(expected, rel=1e-12)


def test_pseudo_huber_has_a_gradient_where_nothing_differs():
    x = images().requires_grad_()
    pseudo_huber(x, images(), 0.03).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


class FakeNetwork(torch.nn.Module):
    """What the package's network is called with, and a number a sample of the shape it gives."""

    def __init__(self, net, verbose):
        super().__init__()
        assert (net, verbose) == ("vgg", False)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y):
        assert x.shape[1] == y.shape[1] == 3
        self.size = x.shape[2:]
        return self.scale * (x - y).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_gets_images_as_its_network_takes_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeNetwork))
    compare = distance("lpips", 0.0)
    assert not compare.network.training
    assert not compare.network.scale.requires_grad
    x, y = torch.full((2, 1, 8, 8), 0.5, requires_grad=True), torch.zeros(2, 1, 8, 8)
    found = compare(x, y)
    assert found.tolist() == pytest.approx([1.0, 1.0])
    assert compare.network.size == (224, 224)
    found.sum().backward()
    assert x.grad.abs().sum() > 0
    compare(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
    assert compare.network.size == (256, 256)
    for shape in ((1, 2, 8, 8), (1, 3, 8)):
        with pytest.raises(ValueError, match="1 or 3"):
            compare(torch.zeros(shape), torch.zeros(shape))


def test_what_lpips_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"cmfast\[lpips\]"):
        distance("lpips", 0.0)

    def unreachable(**options):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=unreachable))
    with pytest.raises(OSError, match=r"VGG16 weights.*no route to host"):
        distance("lpips", 0.0)


def test_errors():
    with pytest.raises(ValueError, match="unknown loss 'l1': choose one of l2, pseudo-huber, lpips"):
        distance("l1", 0.0)
    with pytest.raises(ValueError, match="huber_c"):
        distance("pseudo-huber", 0.0)
