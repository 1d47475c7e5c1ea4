import math
import sys
import types

import pytest
import torch

from cmfast.evaluation.classifier import Classifier, save_classifier
from cmfast.training.methods.losses import DistanceSettings, FeatureDistance, distance, l2, pseudo_huber

from .toy import IMAGES, NOISE, images

OTHERS = torch.tensor(NOISE, dtype=torch.float64).reshape(3, 1, 2, 2)


def squares():
    return [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(IMAGES, NOISE, strict=True)]


def test_l2_is_the_mean_square():
    assert l2(images(), OTHERS).tolist() == pytest.approx([s / 4 for s in squares()], rel=1e-12)
    assert torch.equal(distance(DistanceSettings(loss="l2", huber_c=0.5))(images(), OTHERS), l2(images(), OTHERS))


@pytest.mark.parametrize("c", [0.00054, 0.3])
def test_pseudo_huber_is_that_of_the_paper(c):
    """Song and Dhariwal 2023, equation 7, with c in units of √d."""
    expected = [math.sqrt(s + (c * 2) ** 2) - c * 2 for s in squares()]
    assert pseudo_huber(images(), OTHERS, c).tolist() == pytest.approx(expected, rel=1e-12)
    assert distance(DistanceSettings(loss="pseudo-huber", huber_c=c))(images(), OTHERS).tolist() == pytest.approx(
        expected, rel=1e-12
    )


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
        assert x.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        self.size = x.shape[2:]
        return self.scale * (x - y).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_gets_images_as_its_network_takes_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeNetwork))
    compare = distance(DistanceSettings(loss="lpips", huber_c=0.0))
    assert not compare.network.training
    assert not compare.network.scale.requires_grad
    x, y = torch.full((2, 1, 8, 8), 0.5, requires_grad=True), torch.zeros(2, 1, 8, 8)
    found = compare(x, y)
    assert found.tolist() == pytest.approx([1.0, 1.0])
    assert compare.network.size == (224, 224)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compare(x.bfloat16(), y), found)
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
        distance(DistanceSettings(loss="lpips", huber_c=0.0))

    def unreachable(**options):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=unreachable))
    with pytest.raises(OSError, match=r"VGG16 weights.*no route to host"):
        distance(DistanceSettings(loss="lpips", huber_c=0.0))


@pytest.fixture
def compare(tmp_path):
    """By a classifier with random weights of grey images of 8×8 pixels."""
    torch.manual_seed(3)
    save_classifier(Classifier(), tmp_path / "classifier.safetensors")
    return FeatureDistance(str(tmp_path / "classifier.safetensors"))


def test_features_are_compared_layer_by_layer(compare, tmp_path):
    """Against sums over positions and channels in Python's floats, of the activations of the classifier's layers."""
    x, y = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = []
    for a, b in zip(x, y, strict=True):
        total = 0.0
        for of_a, of_b in zip(*(compare.network.layers(image[None]) for image in (a, b)), strict=True):
            points = [h.reshape(h.shape[1], -1).T.tolist() for h in (of_a, of_b)]
            for u, v in zip(*points, strict=True):
                of_u, of_v = (math.sqrt(sum(c * c for c in w) + 1e-8) for w in (u, v))
                total += sum((c / of_u - d / of_v) ** 2 for c, d in zip(u, v, strict=True)) / len(points[0])
        expected.append(total)
    assert compare(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert compare(x, x).tolist() == [0.0, 0.0]
    settings = DistanceSettings(loss="l2", features=str(tmp_path / "classifier.safetensors"), feature_weight=3.0)
    both = [3.0 * e + m for e, m in zip(expected, (x - y).square().mean((1, 2, 3)).tolist(), strict=True)]
    assert distance(settings)(x, y).tolist() == pytest.approx(both, rel=1e-4)


def test_features_have_gradients_for_the_sample_alone_and_in_float32(compare):
    x, y = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = compare(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        x.requires_grad_()
        assert torch.equal(compare(x, y), exact)
        compare(x, y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in compare.network.parameters())
    nothing = torch.zeros(1, 1, 8, 8, requires_grad=True)
    compare(nothing, nothing.detach()).sum().backward()
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))


def test_features_know_what_they_are_of(compare):
    for shape, message in (
        ((2, 3, 8, 8), r"for samples \[N, 1, H, W\], got \[2, 3, 8, 8\]"),
        ((2, 1, 8), r"for samples \[N, 1, H, W\], got \[2, 1, 8\]"),
        ((2, 1, 12, 12), r"of another size, got \[2, 1, 12, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(FileNotFoundError, match="no classifier at nowhere"):
        distance(DistanceSettings(features="nowhere"))
    with pytest.raises(ValueError, match="feature_weight must be positive, got 0"):
        DistanceSettings(feature_weight=0.0)


def test_errors():
    with pytest.raises(ValueError, match="unknown loss 'l1': choose one of l2, pseudo-huber, lpips"):
        distance(DistanceSettings(loss="l1", huber_c=0.0))
    with pytest.raises(ValueError, match="huber_c"):
        distance(DistanceSettings(loss="pseudo-huber", huber_c=0.0))
