"""The spellings of attention, normalisations and transposed convolutions in other projects' networks."""

import functools
import math
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmfast.engine import Accelerator, capture
from cmfast.engine.passes import PASSES


class Function(nn.Module):
    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(function, *inputs, **parameters):
    """The operators that serve a function, after its result is compared with its own, also after each pass."""
    module = Function(function, **parameters).eval()
    expected = module.double()(*(x.double() for x in inputs))
    module.float()
    fast = Accelerator(module, torch.float32)
    found = fast(*inputs)
    assert found.shape == expected.shape
    assert ((found.double() - expected).norm() / expected.norm()).item() < 2e-6
    graph = capture(module, inputs)
    for rewrite in PASSES.values():
        rewrite(graph)
        graph.nodes.lint()
        assert ((graph.run(*inputs).double() - expected).norm() / expected.norm()).item() < 2e-6
    return [step.operator for step in fast.executable(inputs).steps.steps]


def heads(x, count=3):
    """[N, T, H·D] as [N·H, T, D]: diffusers' head_to_batch_dim."""
    n, t, c = x.shape
    return x.reshape(n, t, count, c // count).permute(0, 2, 1, 3).reshape(n * count, t, c // count)


def joined(x, count=3):
    n, t, d = x.shape
    return x.reshape(n // count, count, t, d).permute(0, 2, 1, 3).reshape(n // count, t, count * d)


def legacy(m, q, k, v):
    """guided-diffusion's: [N, C, T], the scale shared by both operands."""
    q, k, v = (x.mT.reshape(x.shape[0] * 3, -1, x.shape[1]) for x in (q, k, v))
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(q.shape[0] // 3, -1, q.shape[2])


def einsum(m, q, k, v):
    q, k, v = (x.unflatten(2, (3, -1)).transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v).transpose(1, 2).flatten(2)


def matmul(m, q, k, v):
    q, k, v = (x.unflatten(2, (3, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / 3.0).softmax(-1) @ v).transpose(1, 2).flatten(2)


def baddbmm(m, q, k, v):
    q, k, v = heads(q), heads(k), heads(v)
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    return joined(torch.bmm(torch.baddbmm(nothing, q, k.mT, beta=0, alpha=0.3).softmax(-1), v))


ATTENTIONS = {
    "einsum": einsum,
    "matmul": matmul,
    "baddbmm": baddbmm,
    "bmm": lambda m, q, k, v: joined(torch.bmm(torch.bmm(heads(q) * 0.5, heads(k).mT).softmax(2), heads(v))),
    "one head": lambda m, q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v),
    "transposed": lambda m, q, k, v: torch.bmm(v.mT, torch.bmm(q, k.mT).softmax(-1).mT).mT,
    "float of bfloat16": lambda m, q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT).to(q), -1).type(q.dtype), v),
    "guided-diffusion's": legacy,
}


@pytest.mark.parametrize("sizes", [(1, 5, 7), (3, 6, 6), (2, 1, 4), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of_two_products(name, sizes):
    n, queries, keys = sizes
    q, k, v = draw(n, queries, 24), draw(n, keys, 24, seed=1), draw(n, keys, 24, seed=2)
    operators = run(ATTENTIONS[name], q, k, v)
    if keys == 1 and "aten.bmm" in operators:  # einsum multiplies by the one key, element by element
        return
    assert "attention" in operators
    assert not {"aten.bmm", "aten._softmax"} & set(operators)


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_of_layers_outputs_are_not_copied(batch):
    """MONAI's attention blocks; the rows of a linear layer's output are samples times tokens."""

    def function(m, x):
        q, k, v = (F.linear(x, w).unflatten(2, (3, 8)).permute(0, 2, 1, 3) for w in m.projections.chunk(3))
        weights = (torch.einsum("blxd,blyd->blxy", q, k) * 0.3).softmax(-1)
        y = torch.einsum("bhxy,bhyd->bhxd", weights, v).permute(0, 2, 1, 3).reshape(x.shape)
        return F.linear(y, m.out)

    weights = {"projections": draw(72, 24, seed=1) / 5, "out": draw(24, 24, seed=2) / 5}
    for tokens in (5, 3):
        operators = run(function, draw(batch, tokens, 24), **weights)
        assert operators == ["conv2d", "attention", "conv2d"]


OTHERS = {
    "masked": lambda m, q, k, v: torch.bmm((torch.bmm(q, k.mT) + torch.ones(5, 7).tril().to(q)).softmax(-1), v),
    "over the queries": lambda m, q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(1), v),
    "read twice": lambda m, q, k, v: (lambda w: torch.bmm(w, v) + w[..., :1])(torch.bmm(q, k.mT).softmax(-1)),
    "scores read twice": lambda m, q, k, v: (lambda s: torch.bmm(s.softmax(-1), v) + s[..., :1])(torch.bmm(q, k.mT)),
    "values of another size": lambda m, q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v[..., :5]),
    "weights on the right": lambda m, q, k, v: torch.bmm(v[:, :5].mT, torch.bmm(q, k[:, :6].mT).softmax(-1)),
    "linear": lambda m, q, k, v: torch.bmm(q.softmax(-1), torch.bmm(k.softmax(1).mT, v)),
    "of itself": lambda m, q, k, v: (lambda w: torch.bmm(w, w))(torch.bmm(q[:, :5], k[:, :5].mT).softmax(-1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_are_left_alone(name):
    q, k, v = draw(2, 5, 24), draw(2, 7, 24, seed=1), draw(2, 7, 24, seed=2)
    operators = run(OTHERS[name], q, k, v)
    assert "attention" not in operators
    assert "aten.bmm" in operators


def diffusers_rms(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight


def image_layer_norm(m, x):
    return F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], m.weight, m.bias).permute(0, 3, 1, 2)


def denoising_diffusion(m, x, row):
    """Its RMSNorm, FiLM and SiLU."""
    scale, shift = row[:, :, None, None].chunk(2, dim=1)
    return F.silu(F.normalize(x, dim=1) * m.weight[:, None, None] * x.shape[1] ** 0.5 * (scale + 1) + shift)


TOKENS, IMAGE, ROW = draw(2, 9, 40), draw(2, 40, 5, 6), draw(2, 80, seed=3)
NORMS = {
    "layer_norm": (lambda m, x: F.layer_norm(x, [40], m.weight, m.bias, 1e-3), (TOKENS,)),
    "layer_norm alone": (lambda m, x: F.layer_norm(x, [40]), (TOKENS,)),
    "layer_norm of rows": (lambda m, x: F.layer_norm(x, [40], m.weight), (TOKENS[0],)),
    "layer_norm of an image": (image_layer_norm, (IMAGE,)),
    "rsqrt": (diffusers_rms, (TOKENS,)),
    "rsqrt of squares": (lambda m, x: m.weight * ((x * x).mean(2, True).rsqrt() * x), (TOKENS,)),
    "normalize": (lambda m, x: F.normalize(x, dim=-1) * 3, (TOKENS,)),
    "normalize of an image": (lambda m, x: F.normalize(x, dim=1, eps=5.0) * m.weight[:, None, None] * 2, (IMAGE,)),
    "with film": (denoising_diffusion, (IMAGE, ROW)),
    "with film, one sample": (denoising_diffusion, (IMAGE[:1], ROW[:1])),
    "with a bias": (lambda m, x: F.normalize(x, dim=1) * m.weight[:, None, None] + m.bias[:, None, None], (IMAGE,)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_channels(name):
    function, inputs = NORMS[name]
    operators = run(function, *inputs, weight=draw(40, seed=4), bias=draw(40, seed=5))
    assert operators.count("channel_norm") == 1
    assert set(operators) <= {"channel_norm", "aten.sub.Tensor", "aten.clone"}


OTHER_NORMS = {
    "over two dimensions": (lambda m, x: F.layer_norm(x, [9, 40]), (TOKENS,)),
    "over the samples": (lambda m, x: F.normalize(x, dim=0), (TOKENS,)),
    "over the rows of an image": (lambda m, x: F.normalize(x, dim=2), (IMAGE,)),
    "of another order": (lambda m, x: F.normalize(x, p=1, dim=1), (IMAGE,)),
    "by another's length": (lambda m, x, y: x * (y[:, :40] ** 2).mean(1, True).rsqrt()[..., None, None], (IMAGE, ROW)),
    "of the sum": (lambda m, x: x * (x.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt(), (TOKENS,)),
    "of cubes": (lambda m, x: x * (x.abs().pow(3).mean(-1, keepdim=True) + 1e-6).rsqrt(), (TOKENS,)),
}


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_other_norms_are_left_alone(name):
    function, inputs = OTHER_NORMS[name]
    assert "channel_norm" not in run(function, *inputs)


def test_statistics_of_a_layer_norm_may_be_read():
    operators = run(lambda m, x: torch.native_layer_norm(x, [40], None, None, 1e-5)[1], TOKENS)
    assert "channel_norm" not in operators


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "more"),
    [(4, 2, 1, 0), (3, 2, 1, 1), (2, 2, 0, 0), (5, 3, 2, 0), (3, 1, 1, 0), (1, 2, 0, 0), (4, 2, 3, 1), (2, 4, 0, 0)],
)
def test_transposed_convolutions(kernel, stride, padding, more, bias):
    def function(m, x):
        given = {"stride": stride, "padding": padding, "output_padding": more}
        return F.conv_transpose2d(x, m.weight, m.bias if bias else None, **given)

    operators = run(function, draw(2, 24, 5, 6), weight=draw(24, 17, kernel, kernel, seed=1), bias=draw(17, seed=2))
    assert "conv2d" in operators
    assert "aten.convolution" not in operators


@pytest.mark.parametrize(
    "arguments",
    [{"stride": (1, 2)}, {"groups": 2}, {"dilation": 2}, {"stride": 3, "output_padding": 2}],
    ids=str,
)
def test_other_transposed_convolutions_are_left_alone(arguments):
    weight = draw(24, 6, 2, 2, seed=1)
    operators = run(lambda m, x: F.conv_transpose2d(x, m.weight, **arguments), draw(2, 24, 5, 6), weight=weight)
    assert "aten.convolution" in operators


def feed_forward(m, x):
    """A transformer's feed-forward layer on tokens of an image, as diffusers' Transformer2DModel has it."""
    n, c, h, w = x.shape
    tokens = F.conv2d(x, m.into).permute(0, 2, 3, 1).reshape(n, h * w, c)
    tokens = F.linear(F.silu(F.linear(F.layer_norm(tokens, [c]), m.up, m.bias)), m.down) + tokens
    return F.conv2d(tokens.reshape(n, h, w, c).permute(0, 3, 1, 2), m.out) + x


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_of_an_image(batch):
    weights = {"into": draw(32, 32, 1, 1, seed=1) / 6, "out": draw(32, 32, 1, 1, seed=2) / 6}
    weights |= {"up": draw(64, 32, seed=3) / 6, "bias": draw(64, seed=4), "down": draw(32, 64, seed=5) / 8}
    operators = run(feed_forward, draw(batch, 32, 5, 6), **weights)
    assert operators == ["conv2d", "channel_norm", "conv2d", "conv2d", "conv2d"]


def attention_block(m, x):
    """A group norm, projections of the positions' tokens, and the sum with the image."""
    n, c, h, w = x.shape
    tokens = F.group_norm(x.flatten(2), 4, m.weight, m.bias).mT
    q, k, v = (F.linear(tokens, p).unflatten(2, (2, -1)).transpose(1, 2) for p in (m.q, m.k, m.v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
    return F.linear(out, m.out).mT.reshape(n, c, h, w) + x


@pytest.mark.parametrize("batch", [1, 3])
def test_projections_of_an_images_tokens(batch):
    weights = {name: draw(32, 32, seed=i) / 6 for i, name in enumerate(("q", "k", "v", "out"))}
    operators = run(attention_block, draw(batch, 32, 4, 6), weight=draw(32, seed=7), bias=draw(32, seed=8), **weights)
    assert operators == ["channel_moments", "fold_group_norm", "conv2d", "attention", "conv2d"]


def test_a_relu_is_written_by_its_convolution():
    """AutoencoderTiny's block; the second ReLU's input is read elsewhere."""

    def function(m, x):
        y = F.conv2d(F.relu(F.conv2d(x, m.a, m.bias, padding=1)), m.b, padding=1) + x
        return F.conv2d(F.relu(y), m.a) + F.conv2d(y, m.a).relu_().mean()

    weights = {"a": draw(16, 16, 3, 3, seed=1) / 12, "b": draw(16, 16, 3, 3, seed=2) / 12, "bias": draw(16, seed=3)}
    operators = run(function, draw(2, 16, 5, 6), **weights)
    assert (operators.count("conv2d"), operators.count("aten.relu")) == (4, 1)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "activation", [F.gelu, functools.partial(F.gelu, approximate="tanh"), F.silu, lambda x: x * torch.sigmoid(x)]
)
def test_a_gated_linear_unit_is_read_by_its_second_layer(activation, order):
    """diffusers' GEGLU and SwiGLU, whose gate is the second half; or of two layers, which are taken as one."""

    def halves(m, x):
        h, gate = F.linear(x, m.first).chunk(2, -1)
        return F.linear(operator.mul(*(h, activation(gate))[::order]), m.second) + x

    def layers(m, x):
        h, gate = F.linear(x, m.first[:40]), F.linear(x, m.first[40:], m.bias)
        return F.linear(operator.mul(*(h, activation(gate))[::order]), m.second) + x

    weights = {"first": draw(80, 24, seed=1) / 5, "second": draw(24, 40, seed=2) / 6, "bias": draw(40, seed=3)}
    assert run(halves, draw(2, 15, 24), **weights) == ["conv2d", "conv2d"]
    assert run(layers, draw(2, 15, 24), **weights) == ["conv2d", "conv2d"]


def test_products_that_are_no_gates_stay():
    """The activation is read elsewhere; the gate is one number a token; the product is read twice."""

    def function(m, x):
        h, gate = F.linear(x, m.first).chunk(2, -1)
        active = F.gelu(gate)
        y = F.linear(h * active, m.second) + active.mean()
        y = y + F.linear(h * F.gelu(gate[..., :1]), m.second)
        product = h * F.silu(gate)
        return y + F.linear(product, m.second) + product.mean()

    weights = {"first": draw(80, 24, seed=1) / 5, "second": draw(24, 40, seed=2) / 6}
    assert run(function, draw(2, 15, 24), **weights).count("aten.mul.Tensor") == 3


def swish(x):
    return x * torch.sigmoid(x)


def test_silu_by_its_definition():
    """DDPM's residual block; a product of one tensor with the sigmoid of another is none."""

    def function(m, x):
        y = F.conv2d(swish(F.group_norm(x, 4, m.weight, m.bias)), m.a, padding=1)
        y = F.conv2d(swish(F.group_norm(y, 4, m.weight, m.bias)), m.b, padding=1)
        return x + F.conv2d(torch.sigmoid(y) * y, m.last) + y * torch.sigmoid(x)

    weights = {name: draw(16, 16, 3, 3, seed=i) / 12 for i, name in enumerate("ab")}
    weights |= {"weight": draw(16, seed=3), "bias": draw(16, seed=4), "last": draw(16, 16, 1, 1, seed=5) / 4}
    operators = run(function, draw(2, 16, 5, 6), **weights)
    assert operators.count("conv2d") == 3
    assert operators.count("aten.sigmoid") == 1
    assert not {"aten.silu", "group_norm"} & set(operators)


def test_group_norm_of_a_pair():
    def function(m, x, y):
        u = torch.cat((x, y), 1)
        return F.conv2d(F.silu(F.group_norm(u, 4, m.weight, m.bias)), m.last, padding=1) + F.conv2d(u, m.skip)

    weights = {"weight": draw(40, seed=2), "bias": draw(40, seed=3)}
    weights |= {"last": draw(24, 40, 3, 3, seed=4) / 20, "skip": draw(24, 40, 1, 1, seed=5) / 6}
    operators = run(function, draw(2, 24, 5, 6), draw(2, 16, 5, 6, seed=1), **weights)
    assert sorted(operators) == ["channel_moments", "channel_moments", "conv2d", "conv2d", "fold_group_norm"]


def test_views_of_views():
    def function(m, x):
        return x[:, None].flatten(1).unsqueeze(2).transpose(1, 2).squeeze(1) + 1

    graph = capture(Function(function), (draw(2, 3, 4),))
    PASSES["views"](graph)
    operators = [str(node.target) for node in graph.nodes.nodes if node.op == "call_function"]
    assert operators == ["aten.view.default", "aten.add.Tensor"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.permute(1, 2, 0).permute(2, 0, 1) + 1,
        lambda m, x: x.transpose(1, 2).contiguous().view(2, 12) + 1,
        lambda m, x: x.mT.reshape(6, 4).t() + 1,
        lambda m, x: x.expand(2, 3, 4) + x.unsqueeze(0).expand(5, 2, 3, 4).clone(),
        lambda m, x: x.transpose(0, 1).clone().as_strided((3, 2), (8, 1)) + 1,
    ],
)
def test_what_is_viewed_is_right(function):
    run(function, draw(2, 3, 4))


def diagonal(m, x):
    """A convolution whose weights are written to zeros at every call, as k-diffusion's resampling has it."""
    weight = x.new_zeros([3, 3, 1, 1])
    indices = torch.arange(3, device=x.device)
    weight[indices, indices] = m.w.to(weight)[:, None, None]
    return F.conv2d(x[..., None], weight)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.zeros_like(x) + torch.ones_like(x, dtype=torch.int64) + torch.full_like(x, 3.5),
        lambda m, x: x + x.new_zeros(x.shape[2]) + x.new_ones([1]) + x.new_full((3, 1), 2.5),
        diagonal,
    ],
)
def test_what_is_filled_is_constant(function):
    operators = run(function, draw(2, 3, 4), w=draw(3))
    assert not {"aten.zeros_like", "aten.new_zeros", "aten.full", "aten.index_put", "aten.convolution"} & set(operators)


def test_parts_of_a_parameter_are_constant():
    """denoising-diffusion's memory of keys and values."""

    def function(m, x):
        first, second = (t.unsqueeze(0).expand(len(x), *t.shape) for t in m.memory)
        third, _ = m.memory[0].split(2)
        return torch.cat((first, x, second), 1) + third[0]

    assert run(function, draw(2, 3, 4), memory=draw(2, 4, 4)) == ["aten.cat", "aten.add.Tensor"]


def test_a_sum_of_products_is_film():
    """k-diffusion's AdaGN."""

    def function(m, x, row):
        weight, bias = row.chunk(2, 1)
        y = torch.addcmul(bias[..., None, None], F.group_norm(x, 4), weight[..., None, None] + 1)
        return F.conv2d(F.silu(y), m.weight)

    operators = run(function, draw(2, 40, 5, 6), draw(2, 80, seed=1), weight=draw(24, 40, 1, 1, seed=2) / 6)
    assert operators == ["group_norm", "conv2d"]
    run(lambda m, x, y: torch.addcmul(x, y, y, value=3), draw(2, 3), draw(2, 3, seed=1))


def layers_each(*layers):
    return lambda m, x: functools.reduce(lambda y, layer: layer(m, y), layers, x)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("padding", lambda m, x: F.conv2d(F.pad(x, (0, 1, 0, 1)), m.weight, stride=2)),
        ("group_norm pattern", lambda m, x: F.group_norm(x, 4)),
        ("silu pattern", lambda m, x: x * torch.sigmoid(x)),
    ],
)
@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_pass_says_how_often_it_rewrote(times, name, function):
    weight = draw(8, 8, 3, 3, seed=1) / 9
    net = Function(layers_each(*[function] * times, lambda m, x: x + 1), weight=weight).eval().requires_grad_(False)
    x = draw(1, 8, 16, 16)
    fast = Accelerator(net, torch.float32)
    torch.testing.assert_close(fast(x), net(x))
    assert fast.executable((x,)).rewrites[name] == times
