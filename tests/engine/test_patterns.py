"""What torch's operators are recognised as: every spelling is computed right, and none is left to torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmfast.engine import Accelerator, capture
from cmfast.engine.passes import PASSES

C = 32


class Block(nn.Module):
    def __init__(self, function, dims=2):
        super().__init__()
        self.function = function
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.last = conv(C, C, 3, padding=1), conv(C, C, 3, padding=1)
        self.norm, self.plain = nn.GroupNorm(8, C), nn.GroupNorm(8, C, affine=False)
        self.row, self.film = nn.Linear(16, C), nn.Linear(16, 2 * C)

    def forward(self, x, emb):
        return self.function(self, self.first(x), emb)


def image(row, x):
    return row[(..., *(None,) * (x.ndim - 2))]


def film(m, h, e):
    return image(m.film(e), h).chunk(2, dim=1)


GROUP_NORMS = {
    "alone": lambda m, h, e: m.norm(h),
    "then silu": lambda m, h, e: m.last(F.silu(m.norm(h))),
    "without weights": lambda m, h, e: m.last(F.silu(m.plain(h))),
    "in place silu": lambda m, h, e: m.last(F.silu(m.norm(h), inplace=True)),
    "after an addition": lambda m, h, e: m.last(F.silu(m.norm(h + image(m.row(e), h)))),
    "after an addition the other way": lambda m, h, e: m.last(F.silu(m.norm(image(m.row(e), h) + h))),
    "added and read elsewhere": lambda m, h, e: (lambda u: m.last(F.silu(m.norm(u))) + u)(h + image(m.row(e), h)),
    "film": lambda m, h, e: (lambda s, t: m.last(F.silu(m.norm(h) * (1 + s) + t)))(*film(m, h, e)),
    "film the other way": lambda m, h, e: (lambda s, t: m.last(F.silu(t + (s + 1) * m.norm(h))))(*film(m, h, e)),
    "film of rows": lambda m, h, e: (lambda s, t: m.last(F.silu(m.norm(h) * image(s + 1, h) + image(t, h))))(
        *m.film(e).chunk(2, 1)
    ),
    "film without the one": lambda m, h, e: (lambda s, t: m.last(F.silu(m.norm(h) * s + t)))(*film(m, h, e)),
    "a scale alone": lambda m, h, e: m.last(F.silu(m.norm(h) * (1 + image(m.row(e), h)))),
    "a shift alone": lambda m, h, e: m.last(m.norm(h) + image(m.row(e), h)),
    "film, and the norm read twice": lambda m, h, e: (lambda y: y * image(m.row(e), h) + y)(m.norm(h)),
    "scaled by alpha": lambda m, h, e: torch.add(m.norm(h), image(m.row(e), h), alpha=3),
    "times a number": lambda m, h, e: m.norm(h) * 2 + 1,
    "times an image": lambda m, h, e: m.norm(h) * h + h,
    "another activation": lambda m, h, e: m.last(torch.tanh(m.norm(h))),
}


def run(function, shape, dtype=torch.float32):
    torch.manual_seed(0)
    block = Block(function, len(shape) - 2).eval()
    inputs = torch.randn(shape), torch.randn(shape[0], 16)
    with torch.no_grad():
        expected = block.double()(*(t.double() for t in inputs))
    return block.float(), inputs, expected


@pytest.mark.parametrize("shape", [(2, C, 6, 5), (3, C, 1, 1), (1, C, 7), (2, C, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", GROUP_NORMS)
def test_group_norms_are_right_and_recognised(name, shape):
    block, inputs, expected = run(GROUP_NORMS[name], shape)
    accelerator = Accelerator(block, torch.float32)
    found = accelerator(*inputs)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-5
    operators = {step.operator for step in accelerator.executable(inputs).steps.steps}
    assert "aten.native_group_norm" not in operators
    if name in ("film", "film the other way", "film of rows", "after an addition", "then silu"):
        assert not operators & {"aten.silu", "aten.mul.Tensor"}


@pytest.mark.parametrize("name", GROUP_NORMS)
@torch.no_grad()
def test_every_pass_leaves_the_result_alone(name):
    block, inputs, expected = run(GROUP_NORMS[name], (2, C, 6, 5))
    graph = capture(block, inputs)
    for rewrite in PASSES.values():
        rewrite(graph)
        graph.nodes.lint()
        found = graph.run(*inputs).double()
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("name", ["film", "film the other way", "film of rows", "then silu"])
def test_nothing_but_convolutions_is_left_of_an_image_block(name):
    block, inputs, _ = run(GROUP_NORMS[name], (2, C, 6, 5))
    accelerator = Accelerator(block, torch.float32)
    left = {step.operator for step in accelerator.executable(inputs).steps.steps if step.reason}
    assert not left


class Attention(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


SDPA = F.scaled_dot_product_attention
MASK = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
#: name: (function, whether it is recognised)
ATTENTIONS = {
    "plain": (lambda q, k, v: SDPA(q, k, v), True),
    "by name": (lambda q, k, v: SDPA(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False), True),
    "scaled": (lambda q, k, v: SDPA(q, k, v, scale=0.7), True),
    "of tokens": (
        lambda q, k, v: SDPA(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
        True,
    ),
    "masked": (lambda q, k, v: SDPA(q, k, v, MASK), False),
    "with a bias": (lambda q, k, v: SDPA(q, k, v, attn_mask=MASK.float()), False),
    "causal": (lambda q, k, v: SDPA(q, k, v, is_causal=True), False),
    "of two dimensions": (lambda q, k, v: SDPA(q[0, 0], k[0, 0], v[0, 0]), True),
    "of three dimensions": (lambda q, k, v: SDPA(q[:, 0], k[:, 0], v[:, 0]), True),
    "of five dimensions": (lambda q, k, v: SDPA(*(torch.stack([x, 2 * x]) for x in (q, k, v))), True),
    "of shared keys": (lambda q, k, v: SDPA(q, k[:, :1], v[:, :1]), True),
    "of keys that all samples share": (lambda q, k, v: SDPA(q, k[0], v[0]), True),
    "of other values": (lambda q, k, v: SDPA(q, k, v[..., :3]), False),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_right_and_recognised(name):
    function, recognised = ATTENTIONS[name]
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, length, 8, generator=g) for length in (5, 7, 7)]
    accelerator = Accelerator(Attention(function).eval(), torch.float32)
    expected = function(*(x.double() if recognised or name != "with a bias" else x for x in inputs)).double()
    found = accelerator(*inputs)
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-5
    served = {step.operator for step in accelerator.executable(inputs).steps.steps if not step.reason}
    assert ("attention" in served) == recognised


class Tokens(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.one, self.two, self.bare = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.function(self, x)


TOKENS = {
    "feed-forward": lambda m, x: x + m.two(F.silu(m.one(x))),
    "without bias": lambda m, x: m.bare(x) + x,
    "siblings": lambda m, x: m.one(x)[..., :8] * m.bare(x),
    "transposed": lambda m, x: m.bare(x.transpose(-1, -2).contiguous().transpose(-1, -2)),
    "by name": lambda m, x: F.linear(input=x, weight=m.one.weight, bias=m.one.bias),
    "with an expanded input": lambda m, x: m.one(x[:1].expand(x.shape)),
}


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 5, 8), (4, 8), (8,)], ids=str)
@pytest.mark.parametrize("name", TOKENS)
def test_linear_layers_of_tokens_are_right_and_served(name, shape):
    if "transposed" in name and len(shape) < 2:
        pytest.skip("there is nothing to transpose")
    torch.manual_seed(0)
    net, x = Tokens(TOKENS[name]).eval(), torch.randn(shape)
    with torch.no_grad():
        expected = net.double()(x.double())
    accelerator = Accelerator(net.float(), torch.float32)
    assert ((accelerator(x).double() - expected).norm() / expected.norm()).item() < 1e-5
    operators = {step.operator for step in accelerator.executable((x,)).steps.steps}
    if len(shape) > 1:
        assert not operators & {"aten.bmm", "aten.mm", "aten.addmm", "aten.linear"}


IDENTITIES = {
    "x / 1": lambda x: x / 1 + 1,
    "x / 1.0": lambda x: torch.tanh(x) / 1.0,
    "1 * x": lambda x: torch.tanh(1.0 * torch.tanh(x)),
    "x + 0": lambda x: torch.tanh(x + 0),
    "x - 0": lambda x: torch.tanh(x - 0.0),
    "x ** 1": lambda x: torch.tanh(x**1),
    "dropout": lambda x: torch.tanh(F.dropout(x, 0.5, training=False)),
    "a copy": lambda x: torch.tanh(x.clone().detach()),
}
NO_IDENTITIES = {
    "x + 1": lambda x: x + 1,
    "x / 2": lambda x: x / 2,
    "1 - x": lambda x: 1 - x,
    "0 + broadcast": lambda x: x[:1] + torch.zeros(3, 1) * 2,
    "integers": lambda x: (x > 0).int() / 1,
}


@pytest.mark.parametrize("name", [*IDENTITIES, *NO_IDENTITIES])
def test_what_changes_nothing_is_left_out(name):
    class Net(nn.Module):
        def forward(self, x):
            return {**IDENTITIES, **NO_IDENTITIES}[name](x)

    x = torch.randn(3, 4)
    found, expected = Accelerator(Net().eval(), torch.float32)(x), Net()(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    graph = capture(Net(), (x,))
    before = len(graph.nodes.nodes)
    count = PASSES["identity pattern"](graph)
    assert (count > 0) == (len(graph.nodes.nodes) < before)
    assert (len(graph.nodes.nodes) < before) == (name in IDENTITIES and name != "dropout")
