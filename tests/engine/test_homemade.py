"""Networks that are not cmfast's: what the passes do not know stays as it was."""

import importlib
import types

import pytest
import torch
from cmfast.kernels import group_norm, native
from torch import nn
from torch.nn import functional as F

import cmfast
from cmfast.engine import Accelerator

from .networks import error, exact


class Homemade(nn.Module):
    """Takes UNet's arguments; `function` has the module, x and the embedding of the times."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        self.embed = nn.Linear(1, 12)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, timesteps, class_labels=None):
        return self.function(self, x, self.embed(timesteps[:, None] / 1000))


def convolution(out=6, kernel=3, **options):
    return nn.Conv2d(4, out, kernel, padding=kernel // 2, **options)


NETWORKS = {
    "grouped": Homemade(lambda m, x, e: m.a(x), a=convolution(8, groups=2)),
    "dilated": Homemade(lambda m, x, e: m.a(x), a=convolution(dilation=2)),
    "oblong": Homemade(lambda m, x, e: m.a(x), a=nn.Conv2d(4, 6, (1, 3), padding=(0, 1))),
    "transposed": Homemade(lambda m, x, e: m.a(x), a=nn.ConvTranspose2d(4, 6, 2, 2)),
    "without-bias": Homemade(
        lambda m, x, e: m.a(x) + m.b(e)[..., None, None], a=convolution(bias=False), b=nn.Linear(12, 6, bias=False)
    ),
    "shared": Homemade(lambda m, x, e: m.b(m.a(x) + m.a(x * 2)), a=convolution(), b=nn.Conv2d(6, 3, 1)),
    "activated-twice": Homemade(
        lambda m, x, e: m.a(F.silu(F.silu(x))) + m.b(F.silu(x)), a=convolution(), b=convolution()
    ),
    "scaled-sum": Homemade(lambda m, x, e: torch.add(m.a(x), m.b(x), alpha=0.5), a=convolution(), b=convolution()),
    "broadcast-sum": Homemade(lambda m, x, e: m.a(x) + e[:, :6, None, None], a=convolution()),
    "added-to-itself": Homemade(lambda m, x, e: (lambda y: y + y)(m.a(x)), a=convolution()),
    "transposed-rows": Homemade(lambda m, x, e: m.a(x).transpose(1, 3).reshape(len(x), 6, -1), a=convolution()),
    "cloned": Homemade(lambda m, x, e: m.b(m.a(x).clone().contiguous()), a=convolution(), b=nn.Conv2d(6, 3, 1)),
    "expanded-table": Homemade(
        lambda m, x, e: m.a(x) + m.b(m.c.weight.expand(len(x), 5, 12)).mean(1)[..., None, None],
        a=convolution(),
        b=nn.Linear(12, 6),
        c=nn.Embedding(5, 12),
    ),
    "upsampled-thrice": Homemade(lambda m, x, e: m.a(F.interpolate(x, scale_factor=3.0)), a=convolution()),
    "odd-pooling": Homemade(lambda m, x, e: m.a(F.avg_pool2d(x, 2)), a=convolution()),
    "three-parts": Homemade(lambda m, x, e: m.a(torch.cat((x[:, :1], x[:, 1:2], x[:, 2:]), 1)), a=convolution()),
    "norm-read-twice": Homemade(
        lambda m, x, e: (lambda y: m.a(y) + y[:, :1])(group_norm(x, 2, m.n.weight, m.n.bias)),
        a=convolution(),
        n=nn.GroupNorm(2, 4),
    ),
    "norm-without-weight": Homemade(lambda m, x, e: m.a(group_norm(x, 2, activation="silu")), a=convolution()),
    "norm-of-the-input": Homemade(
        lambda m, x, e: m.a(group_norm(x, 2, m.n.weight, m.n.bias, add=e[:, :4], activation="silu")),
        a=convolution(),
        n=nn.GroupNorm(2, 4),
    ),
    "strides-by-number": Homemade(lambda m, x, e: m.a(x).as_strided((len(x), 6, 9), (378, 63, 7), 1), a=convolution()),
    "strides-by-number-of-a-copy": Homemade(
        lambda m, x, e: (
            m.a(x).transpose(1, 3).clone(memory_format=torch.contiguous_format).as_strided((2, 7, 9), (378, 54, 6))
        ),
        a=convolution(),
    ),
    "siblings-of-which-one-is-padded": Homemade(
        lambda m, x, e: m.a(e[..., None, None]) * m.b(e[..., None, None]),
        a=nn.Conv2d(12, 6, 1),
        b=nn.Conv2d(12, 6, 1, padding=1),
    ),
    "siblings-of-which-one-has-no-bias": Homemade(
        lambda m, x, e: m.a(x) * m.b(e)[..., None, None] + m.c(e)[..., None, None],
        a=convolution(),
        b=nn.Linear(12, 6, bias=False),
        c=nn.Linear(12, 6),
    ),
    "products-of-one-weight": Homemade(
        lambda m, x, e: F.conv2d(x, m.a.weight * 2.0) + F.conv2d(x, m.a.weight * 3.0)[..., :1], a=convolution()
    ),
    "weighted-addmm": Homemade(
        lambda m, x, e: torch.addmm(m.b.bias, e, m.b.weight.t(), alpha=2.0, beta=3.0), b=nn.Linear(12, 6)
    ),
    "addmm-of-weighted-rows": Homemade(
        lambda m, x, e: torch.addmm(m.b.bias, e, m.b.weight.t(), alpha=2.0), b=nn.Linear(12, 6)
    ),
    "addmm-of-a-weighted-bias": Homemade(
        lambda m, x, e: torch.addmm(m.b.bias, e, m.b.weight.t(), beta=3.0), b=nn.Linear(12, 6)
    ),
    "addmm-of-a-column": Homemade(
        lambda m, x, e: torch.addmm(m.b.bias[:2, None], e, m.b.weight.t()), b=nn.Linear(12, 6)
    ),
    "padded-rows": Homemade(lambda m, x, e: m.a(x.flatten(2)), a=nn.Conv1d(4, 6, 1, padding=1)),
    "strided-rows": Homemade(lambda m, x, e: m.a(x.flatten(2)), a=nn.Conv1d(4, 6, 1, stride=2)),
    "tanh-after-a-norm": Homemade(
        lambda m, x, e: m.a(torch.tanh(group_norm(x, 2, m.n.weight, m.n.bias))), a=convolution(), n=nn.GroupNorm(2, 4)
    ),
    "silu-after-an-activated-norm": Homemade(
        lambda m, x, e: m.a(F.silu(group_norm(x, 2, m.n.weight, m.n.bias, activation="silu"))),
        a=convolution(),
        n=nn.GroupNorm(2, 4),
    ),
    "upsampled-by-two-ratios": Homemade(
        lambda m, x, e: m.a(F.interpolate(x, scale_factor=(2.0, 4.0))), a=convolution()
    ),
    "upsampled-rows": Homemade(lambda m, x, e: m.a(F.interpolate(x, size=(18, 7))), a=convolution()),
    "upsampled-columns": Homemade(lambda m, x, e: m.a(F.interpolate(x, size=(9, 14))), a=convolution()),
    "padded-pooling": Homemade(lambda m, x, e: m.a(F.avg_pool2d(x[..., :8, :6], 2, padding=1)), a=convolution()),
    "pooling-that-rounds-up": Homemade(lambda m, x, e: m.a(F.avg_pool2d(x, 2, ceil_mode=True)), a=convolution()),
    "overlapping-pooling": Homemade(lambda m, x, e: m.a(F.avg_pool2d(x[..., :8, :6], 2, stride=1)), a=convolution()),
    "pooling-with-a-divisor": Homemade(
        lambda m, x, e: m.a(F.avg_pool2d(x[..., :8, :6], 2, divisor_override=3)), a=convolution()
    ),
    "three-residuals": Homemade(
        lambda m, x, e: (m.a(x) + m.b(x)) + m.c(x) + x[:, :1], a=convolution(), b=convolution(), c=convolution()
    ),
    "one-output-added-twice": Homemade(lambda m, x, e: m.a(x) + x + 2 * x, a=convolution(4)),
    "norm-of-a-crop": Homemade(
        lambda m, x, e: m.a(m.n(m.b(x)[..., 1:-1])) + torch.tanh(m.n(m.b(x)[..., 1:-1]))[:, :1],
        a=convolution(),
        b=convolution(4),
        n=nn.GroupNorm(2, 4),
    ),
    "norm-of-a-transposed-image": Homemade(
        lambda m, x, e: m.a(m.n(m.b(x).transpose(2, 3))) + torch.tanh(m.n(m.b(x).transpose(2, 3)))[:, :1],
        a=convolution(),
        b=convolution(4),
        n=nn.GroupNorm(2, 4),
    ),
    "norm-of-some-channels": Homemade(
        lambda m, x, e: m.a(m.n(m.b(x)[:, ::2])), a=convolution(), b=convolution(8), n=nn.GroupNorm(2, 4)
    ),
    "norm-with-every-other-weight": Homemade(
        lambda m, x, e: torch.tanh(F.group_norm(m.b(x), 2, m.n.weight[::2], m.n.bias[::2])) * m.a(x)[:, :1],
        a=convolution(),
        b=convolution(4),
        n=nn.GroupNorm(2, 8),
    ),
    "folded-norm-with-every-other-weight": Homemade(
        lambda m, x, e: m.a(F.group_norm(m.b(x), 2, m.n.weight[::2], m.n.bias[::2])),
        a=convolution(),
        b=convolution(4),
        n=nn.GroupNorm(2, 8),
    ),
    "convolution-with-every-other-bias": Homemade(
        lambda m, x, e: F.conv2d(x, m.b.weight[::2], m.b.bias[::2]), b=convolution(12)
    ),
    "moments-of-a-convolution-that-torch-serves": Homemade(
        lambda m, x, e: m.b(F.silu(m.n(m.a(m.l(e).view(len(x), 4, 3, 1))))),
        a=convolution(8),
        b=nn.Conv2d(8, 3, 3, padding=1),
        l=nn.Linear(12, 12),
        n=nn.GroupNorm(2, 8),
    ),
    "moments-of-an-image-that-torch-serves": Homemade(
        lambda m, x, e: m.a(F.silu(m.n(m.l(e).view(len(x), 4, 3, 1)))),
        a=convolution(8),
        l=nn.Linear(12, 12),
        n=nn.GroupNorm(2, 4),
    ),
    "film-of-expanded-rows": Homemade(
        lambda m, x, e: m.a(group_norm(x, 2, m.n.weight, m.n.bias, scale=e[:1, :4].expand(len(x), 4), shift=e[:, ::3])),
        a=convolution(),
        n=nn.GroupNorm(2, 4),
    ),
    "stacked-rows": Homemade(lambda m, x, e: m.a(torch.cat((x, 2 * x), 2)), a=convolution()),
    "stacked-columns": Homemade(lambda m, x, e: m.a(torch.cat((x, 2 * x), -1)), a=convolution()),
    "two-outputs-of-one-embedding": Homemade(
        lambda m, x, e: m.a(x) * m.b(e)[..., None, None] + m.c(e)[..., None, None],
        a=convolution(),
        b=nn.Linear(12, 6),
        c=nn.Linear(12, 6),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_ones_own(name, dtype):
    torch.manual_seed(0)
    unet = NETWORKS[name].eval()
    inputs = [torch.randn(2, 4, 9, 7), torch.tensor([3.0, 700.0])]
    found = cmfast.accelerate(unet, dtype)(*inputs)
    expected = exact_of(unet, inputs)
    assert found.shape == expected.shape
    assert error(found, expected) < (2e-6 if dtype == torch.float32 else 2e-2)


def exact_of(unet, inputs):
    with cmfast.kernels.use_backend("reference"):
        return exact(unet, inputs)


def test_a_norm_of_one_column_is_served():
    """Its positions are evenly spaced, though not those of the image that it was taken from."""
    unet = Homemade(
        lambda m, x, e: torch.tanh(m.n(m.b(x)[..., :1])) * m.a(x)[:, :1],
        a=convolution(),
        b=convolution(4),
        n=nn.GroupNorm(2, 4),
    ).eval()
    inputs = [torch.randn(2, 4, 9, 7), torch.tensor([3.0, 700.0])]
    accelerator = Accelerator(unet, torch.float32)
    assert error(accelerator(*inputs), exact_of(unet, inputs)) < 2e-6
    assert "group_norm" in {step.operator for step in accelerator.executable(inputs).steps.steps if not step.reason}


def test_integers_stay_integers():
    unet = Homemade(lambda m, x, e: (m.a(x), m.a(x).flatten(1).argmax(1), x > 0), a=convolution()).eval()
    inputs = [torch.randn(2, 4, 9, 7), torch.tensor([3.0, 700.0])]
    found, expected = cmfast.accelerate(unet)(*inputs), unet(*inputs)
    assert [t.dtype for t in found] == [torch.float32, torch.int64, torch.bool]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def test_an_early_output_is_not_written_over():
    def function(m, x, e):
        first = m.a(x)
        last = first
        for _ in range(6):
            last = m.b(torch.tanh(last))
        return first, last

    unet = Homemade(function, a=convolution(), b=nn.Conv2d(6, 6, 3, padding=1)).eval()
    inputs = [torch.randn(2, 4, 9, 7), torch.tensor([3.0, 700.0])]
    for found, expected in zip(cmfast.accelerate(unet)(*inputs), unet(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(2.0, 3.0), (3.0, 2.0), (1.0, 3.0)])
def test_weights_that_were_computed_otherwise_are_not_read_from_the_folder(tmp_path, order):
    torch.manual_seed(0)
    a, x = convolution(), torch.randn(2, 4, 9, 7)
    for factor in (*order, *order):
        unet = Homemade(lambda m, x, e, factor=factor: F.conv2d(x, m.a.weight * factor), a=a).eval()
        unet.embed.weight.data.zero_()
        unet.embed.bias.data.zero_()
        found = cmfast.accelerate(unet, cache=tmp_path)(x, torch.zeros(2))
        torch.testing.assert_close(found, F.conv2d(x, a.weight * factor), rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2


def test_constants_that_are_no_parameters_are_told_apart_in_the_folder(tmp_path):
    a, x = convolution(), torch.randn(2, 4, 9, 7)
    for factor in (torch.tensor(2.0), torch.tensor(3.0)):
        unet = Homemade(lambda m, x, e, factor=factor: F.conv2d(x, m.a.weight * factor), a=a).eval()
        found = cmfast.accelerate(unet, cache=tmp_path)(x, torch.zeros(2))
        torch.testing.assert_close(found, F.conv2d(x, a.weight * factor), rtol=1e-5, atol=1e-5)


def test_weights_that_depend_on_the_shape_are_packed_for_each():
    a = convolution()
    unet = Homemade(lambda m, x, e: F.conv2d(x, m.a.weight * (1.0 if x.shape[2] > 8 else 3.0)), a=a).eval()
    fast = cmfast.accelerate(unet)
    for size in (9, 7):
        x = torch.randn(2, 4, size, size)
        expected = F.conv2d(x, a.weight * (1.0 if size > 8 else 3.0))
        torch.testing.assert_close(fast(x, torch.zeros(2)), expected, rtol=1e-5, atol=1e-5)


def test_another_packing_is_not_read(tmp_path, monkeypatch):
    packing = importlib.import_module("cmfast.kernels.cpu.conv")
    unet, inputs = NETWORKS["shared"].eval(), [torch.randn(2, 4, 9, 7), torch.zeros(2)]
    for number, layout in ((1, "panels of 48"), (2, "panels of 48"), (1, "tiles of 16 x 16")):
        monkeypatch.setattr(packing, "PACKING", number)
        build_info = native.cpu().build_info() | {"layout": layout}
        module = types.SimpleNamespace(**vars(native.cpu()) | {"build_info": lambda found=build_info: found})
        with native.stand_in(module, "_cpu"):
            cmfast.accelerate(unet, cache=tmp_path)(*inputs)
    assert len(list(tmp_path.iterdir())) == 3


def test_packed_weights_are_those_of_the_file_that_was_looked_at(tmp_path):
    """Whatever takes its place before they are read, such as what another process wrote."""
    from cmfast.engine.cpu import cache

    a, path = torch.randn(1000), tmp_path / "w.safetensors"
    cache.write(path, {"a": a})
    stored = cache.Stored(path)
    cache.write(path, {"b": torch.zeros(10), "a": torch.zeros(1000)})
    assert torch.equal(stored.read("a"), a)
    assert set(cache.Stored(path)) == {"a", "b"}


@torch.no_grad()
def test_what_others_have_packed_stays_in_the_cache(tmp_path):
    """Two kinds of calls read different weights; neither's leave the file when the other's are written."""

    class Either(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))

        def forward(self, x, first):
            return self.a(x) if first else self.b(x)

    network, small, large = Either().eval(), torch.randn(1, 32, 4, 4), torch.randn(1, 32, 8, 8)
    cmfast.accelerate(network, cache=tmp_path)(large, True)
    cmfast.accelerate(network, cache=tmp_path)(large, False)
    fast = cmfast.accelerate(network, cache=tmp_path)
    for x, first in ((small, True), (large, False), (large, True), (small, False)):
        assert (fast(x, first) - network(x, first)).norm() <= 1e-5 * network(x, first).norm()
