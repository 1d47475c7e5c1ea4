"""Convolutions of every shape within a network: ours where there is a form for them, torch's elsewhere; all right."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmfast.engine import Accelerator, capture
from cmfast.engine.graph import CONV, arguments
from cmfast.engine.passes import PASSES

from .networks import KINDS, error, exact, network

OURS = {"conv2d", "channel_moments", "fold_group_norm", "group_norm", "attention"}
CONVOLUTIONS = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SIZES = {1: (31,), 2: (9, 7), 3: (5, 9, 7)}


class Layers(nn.Module):
    """The function of the module and x, with whatever layers it needs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def accelerated(module, x, products=torch.float32, **options):
    """(its output, the steps that torch serves, the conv2d steps)."""
    fast = Accelerator(module.eval(), products, **options)
    out, steps = fast(x), fast.executable([x]).steps.steps
    left = [step for step in steps if step.reason]
    assert all(step.operator in OURS for step in steps if not step.reason)
    return out, left, [step for step in steps if step.operator == "conv2d"]


def relative(found, module, x):
    """The largest error, relative to the output's scale."""
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(x.double())
    assert found.shape == wanted.shape
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["audio", "audio-strided", "video", "video-strided"])
def test_networks_of_audio_and_video_leave_no_layer_to_torch(kind, batch, products):
    unet, inputs = network(kind, batch)
    fast = Accelerator(unet, products)
    found, expected = fast(*inputs), exact(unet, inputs)
    if products == torch.float32:
        assert ((found.double() - expected).abs().max() / expected.abs().max()).item() < 1e-5
    elif kind != "video":  # torch has no average pooling of three dimensions in bfloat16
        half = copy.deepcopy(unet).bfloat16()(inputs[0].bfloat16(), *inputs[1:])
        assert error(found, expected) < 2 * error(half, expected)
    steps = fast.executable(inputs).steps.steps
    left = {step.operator for step in steps if step.reason}
    assert left <= {"timestep_embedding", "aten.embedding"}
    assert {step.operator for step in steps if not step.reason} == {"conv2d", "fold_group_norm", "attention"}


def block(dims, kernel):
    conv = CONVOLUTIONS[dims]

    def function(m, x):
        joined = torch.cat((m.first(x), x), 1)
        return m.second(F.silu(m.norm(joined))) + m.skip(joined)

    return Layers(
        function,
        first=conv(16, 24, kernel, padding="same"),
        norm=nn.GroupNorm(4, 40),
        second=conv(40, 20, kernel, padding="same"),
        skip=conv(40, 20, 1),
    )


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dims", SIZES)
def test_a_block_with_a_skip_is_convolutions_alone(dims, kernel, batch, products):
    torch.manual_seed(0)
    module, x = block(dims, kernel), torch.randn(batch, 16, *SIZES[dims])
    found, left, convolutions = accelerated(module, x, products)
    assert relative(found, module, x) < (1e-5 if products == torch.float32 else 2e-2)
    assert not left
    given = [step.arguments[2] for step in convolutions]
    assert sum(a.skip is not None for a in given) == 2
    assert sum(a.residual is not None for a in given) == 1
    assert any(a.gain is not None and a.silu for a in given)


PLAIN = {
    "1 x 3": nn.Conv2d(16, 20, (1, 3), padding=(0, 1)),
    "5 x 2, strides": nn.Conv2d(16, 20, (5, 2), stride=(1, 2), padding=(2, 1)),
    "of even size, the same": nn.Conv2d(16, 20, 4, padding="same"),
    "without bias": nn.Conv2d(16, 20, 3, bias=False),
    "audio of stride 3": nn.Conv1d(16, 20, 5, stride=3, padding=2),
    "one sample of audio": nn.Conv1d(16, 20, 31),
    "video, each image": nn.Conv3d(16, 20, (1, 3, 3), padding=(0, 1, 1)),
    "video, along the time": nn.Conv3d(16, 20, (3, 1, 1), padding=(1, 0, 0)),
    "video of stride 2": nn.Conv3d(16, 20, 3, stride=2, padding=1),
    "video, no padding": nn.Conv3d(16, 20, (5, 3, 2)),
    "transposed views": Layers(lambda m, x: m.a(x.transpose(2, 3)).transpose(2, 3), a=nn.Conv2d(16, 20, 3, padding=1)),
    "every other image": Layers(lambda m, x: m.a(x[:, :, ::2]), a=nn.Conv3d(16, 20, 3, padding=1)),
    "images of a video": Layers(
        lambda m, x: m.a(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2),
        a=nn.Conv2d(16, 20, 3, padding=1),
    ),
}
DIMS = {"transposed views": 2, "every other image": 3, "images of a video": 3}


def input_of(name, layer):
    dims = DIMS.get(name) or CONVOLUTIONS.index(type(layer))
    return torch.randn(2, 16, *SIZES[dims], generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", PLAIN)
def test_convolutions_that_are_ours(name):
    layer = PLAIN[name]
    x = input_of(name, layer)
    found, left, convolutions = accelerated(layer, x)
    assert relative(found, layer, x) < 1e-5
    assert len(convolutions) == 1
    assert not left


LEFT = {
    "grouped": nn.Conv2d(16, 20, 3, padding=1, groups=4),
    "dilated": nn.Conv2d(16, 20, 3, padding=2, dilation=2),
    "grouped audio": nn.Conv1d(16, 16, 3, padding=1, groups=16),
    "dilated audio": nn.Conv1d(16, 20, 3, padding=4, dilation=4),
    "transposed audio": nn.ConvTranspose1d(16, 20, 4, stride=2),
    "grouped video": nn.Conv3d(16, 20, 3, groups=2),
    "video dilated in time": nn.Conv3d(16, 20, 3, padding=(2, 1, 1), dilation=(2, 1, 1)),
    "transposed video": nn.ConvTranspose3d(16, 20, 2, stride=2),
}


@pytest.mark.parametrize("name", LEFT)
def test_convolutions_that_are_torchs(name):
    layer = LEFT[name]
    dims = next(d for d in SIZES if f"{d}d" in type(layer).__name__)
    x = torch.randn(2, 16, *SIZES[dims], generator=torch.Generator().manual_seed(1))
    found, left, convolutions = accelerated(layer, x)
    assert relative(found, layer, x) < 1e-5
    assert [step.operator for step in left] == ["aten.convolution"]
    assert not convolutions


PADDED = {
    "right and below": ((0, 1, 0, 1), 2, 2, (0, 1, 0, 1)),
    "left and above": ((1, 0, 1, 0), 2, 2, (1, 0, 1, 0)),
    "all sides apart": ((3, 0, 1, 2), 2, 1, (1, 2, 3, 0)),
    "the last dimension": ((2, 1), 2, 1, (0, 0, 2, 1)),
    "the channels by none": ((1, 1, 0, 0, 0, 0), 2, 1, (0, 0, 1, 1)),
    "audio": ((2, 0), 1, 1, (2, 0)),
    "video, causal": ((1, 1, 1, 1, 2, 0), 3, 1, (2, 0, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("name", PADDED)
def test_zeros_are_padding_of_the_convolution(name, own):
    pad, dims, stride, sides = PADDED[name]
    layer = CONVOLUTIONS[dims](16, 20, 3, stride=stride, padding=own)
    module = Layers(lambda m, x: m.a(F.pad(x, pad)), a=layer)
    x = torch.randn(3, 16, *SIZES[dims])
    found, left, (step,) = accelerated(module, x)
    assert relative(found, module, x) < 1e-5
    assert not left
    assert tuple(step.arguments[2].padding) == tuple(side + own for side in sides)


def test_zeros_after_a_norm_and_an_activation_are_not_activated():
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.bias)
    module = Layers(
        lambda m, x: m.b(F.pad(F.silu(m.n(m.a(x))), (0, 1, 0, 1))),
        a=nn.Conv2d(16, 16, 3, padding=1),
        n=norm,
        b=nn.Conv2d(16, 20, 3, stride=2),
    )
    x = torch.randn(2, 16, 8, 10)
    found, left, convolutions = accelerated(module, x)
    assert relative(found, module, x) < 1e-5
    assert not left
    assert len(convolutions) == 2


NOT_PADDING = {
    "ones": lambda m, x: m.a(F.pad(x, (0, 1, 0, 1), value=1.0)),
    "less": lambda m, x: m.a(F.pad(x, (-1, 2, 0, 1))),
    "channels": lambda m, x: m.a(F.pad(x[:, :15], (0, 0, 0, 0, 0, 1))),
    "samples": lambda m, x: m.a(F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))),
    "read twice": lambda m, x: (lambda y: m.a(y) + y[:, :1, :-2, :-2])(F.pad(x, (0, 1, 0, 1))),
}


@pytest.mark.parametrize("name", NOT_PADDING)
def test_other_padding_stays(name):
    module = Layers(NOT_PADDING[name], a=nn.Conv2d(16, 20, 3))
    x = torch.randn(2, 16, 8, 9)
    found, left, _ = accelerated(module, x)
    assert relative(found, module, x) < 1e-5
    assert "aten.constant_pad_nd" in [step.operator for step in left]


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", SIZES)
def test_padding_by_the_image_itself_is_torchs_and_the_convolution_ours(dims, mode):
    conv = CONVOLUTIONS[dims]
    layers = {"a": conv(16, 20, 3, padding=1), "b": conv(20, 16, 4, stride=2, padding=2)}
    for layer in layers.values():  # as networks for tileable textures are made of others
        layer.padding_mode = mode
    module = Layers(lambda m, x: m.b(F.silu(m.n(m.a(x)))), n=nn.GroupNorm(4, 20), **layers)
    x = torch.randn(3, 16, *SIZES[dims])
    found, left, convolutions = accelerated(module, x)
    assert relative(found, module, x) < 1e-5
    assert len(convolutions) == 2
    assert {step.operator for step in left} <= {
        "aten.cat",
        f"aten.reflection_pad{dims}d",
        f"aten.replication_pad{dims}d",
    }


@pytest.mark.parametrize(
    ("size", "pad"),
    [
        ((6,), (6, 2)),
        ((6,), (0, 0)),
        ((4, 5), (2, -1, 0, 3)),
        ((4, 5), (-2, -3, 1, 1)),
        ((3, 2, 4), (1, 2, 0, -1, 3, 3)),
    ],
)
def test_circular_padding_of_any_sides(size, pad):
    module = Layers(lambda m, x: F.pad(x, pad, mode="circular") * m.a.bias, a=nn.Conv1d(1, 1, 1)).eval()
    x = torch.randn(2, 3, *(3, 4, 6)[-len(pad) // 2 :])
    with torch.no_grad():
        assert torch.equal(Accelerator(module, torch.float32, whole=True)(x), module(x))


def test_circular_padding_by_more_than_there_is_is_refused_as_torch_does():
    module = Layers(lambda m, x: m.a(F.pad(x, (4, 4), mode="circular")), a=nn.Conv1d(3, 3, 1)).eval()
    with pytest.raises(RuntimeError, match="wrapping around more than once"):
        Accelerator(module, torch.float32)(torch.randn(2, 3, 3))


def test_the_pass_of_padding_finds_nothing_twice():
    module = Layers(lambda m, x: m.a(F.pad(x, (0, 1, 0, 1))), a=nn.Conv2d(16, 20, 3))
    graph = capture(module, [torch.randn(1, 16, 8, 8)])
    PASSES["convolutions"](graph)
    assert PASSES["padding"](graph) == 1
    graph.nodes.lint()
    (node,) = graph.calls(CONV)
    assert arguments(node)["padding"] == (0, 1, 0, 1)
    assert PASSES["padding"](graph) == 0


POOL = (None, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
#: name: (function, dimensions, whether it is done as the convolution reads its input)
RESAMPLED = {
    "audio upsampled": (lambda x: F.interpolate(x, scale_factor=2.0), 1, True),
    "audio pooled": (lambda x: F.avg_pool1d(x, 2), 1, True),
    "images upsampled": (lambda x: F.interpolate(x, scale_factor=2.0), 2, True),
    "images upsampled to a size": (lambda x: F.interpolate(x, size=(16, 20)), 2, True),
    "images of a video upsampled": (lambda x: F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)), 3, True),
    "images of a video pooled": (lambda x: F.avg_pool3d(x, (1, 2, 2)), 3, True),
    "audio upsampled by more": (lambda x: F.interpolate(x, scale_factor=2.1), 1, False),
    "audio pooled with padding": (lambda x: F.avg_pool1d(x, 2, padding=1), 1, False),
    "audio pooled in threes": (lambda x: F.avg_pool1d(x, 3), 1, False),
    "images upsampled by more": (lambda x: F.interpolate(x, scale_factor=2.05), 2, False),
    "columns pooled": (lambda x: F.avg_pool2d(x, (1, 2)), 2, False),
    "a video upsampled": (lambda x: F.interpolate(x, scale_factor=2.0), 3, False),
    "a video pooled": (lambda x: F.avg_pool3d(x, 2), 3, False),
    "a column of audio pooled": (lambda x: F.avg_pool2d(x[:, :, :, None], (2, 1))[..., 0], 1, False),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", RESAMPLED)
def test_resampling(name, batch):
    function, dims, fused = RESAMPLED[name]
    conv = CONVOLUTIONS[dims]
    layers = {"a": conv(16, 20, 3, padding=1), "b": conv(16, 20, 3, padding=1)}
    # Both what is convolved and what is added to it.
    module = Layers(lambda m, x: m.a(function(x)) + function(m.b(x)), **layers)
    x = torch.randn(batch, 16, *(4, 8, 10)[-dims:])
    found, left, convolutions = accelerated(module, x)
    assert relative(found, module, x) < 1e-5
    assert (not left) == fused
    how = [(s.arguments[2].resample, s.arguments[2].residual_resample) for s in convolutions]
    assert any(a is not None and a == b for a, b in how) == fused


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("audio", "video"))])
def test_forms_of_audio_and_video_are_measured(kind):
    unet, inputs = network(kind)
    fast = Accelerator(unet, torch.float32, tune=True)
    assert error(fast(*inputs), exact(unet, inputs)) < 1e-5
    tiles = {form.tile for form in fast.target.weights.forms.values()}
    assert (tiles == {1}) == kind.startswith("audio")


def test_weights_of_a_video_network_are_kept_in_a_folder(tmp_path):
    unet, inputs = network("video")
    expected = Accelerator(unet, torch.float32, cache=tmp_path)(*inputs)
    again = Accelerator(unet, torch.float32, cache=tmp_path)
    assert torch.equal(again(*inputs), expected)
    assert len(list(tmp_path.iterdir())) == 1
    given_up = Accelerator(copy.deepcopy(unet), torch.float32, keep_weights=False)
    assert torch.equal(given_up(*inputs), expected)
