"""Networks that are not cmfast's: what the passes do not know stays as it was."""

import pytest
import torch
from cmfast.kernels import group_norm
from torch import nn
from torch.nn import functional as F

import cmfast

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
