import dataclasses
import json
import math

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from cmfast import ConsistencyModel, UNet, UNetConfig
from cmfast import unet as unet_module
from cmfast.preconditioning import EDM, Consistency
from cmfast.unet import (
    AttentionBlock,
    Downsample,
    Upsample,
    downsample,
    fold_patches,
    timestep_embedding,
    unfold_patches,
    upsample,
)

from .fixture_files import FIXTURES, NETWORKS, network, tiny_config, tiny_unet


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_the_published_reference(name):
    unet, data = network(name)
    labels = data.get("y")
    with torch.no_grad():
        assert relative_error(unet(data["x"], data["timesteps"], labels), data["output"]) < 1e-5
        x, sigma = data["x"] * data["sigma"].reshape(-1, 1, 1, 1), data["sigma"]
        for scheme, key in ((EDM(), "edm"), (Consistency(), "consistency")):
            denoised = ConsistencyModel(unet, scheme).denoise(x, sigma, labels)
            assert relative_error(denoised, data[f"denoised.{key}"]) < 1e-5


@pytest.mark.parametrize("name", ["imagenet64", "lsun256"])
def test_state_dict_of_the_released_checkpoints(name):
    released = json.loads((FIXTURES / f"released_{name}_state_dict.json").read_text())
    with torch.device("meta"):
        unet = UNet(getattr(UNetConfig, name)())
    assert {key: list(value.shape) for key, value in unet.state_dict().items()} == released["state_dict"]
    assert sum(p.numel() for p in unet.parameters()) == released["parameters"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("resblock_updown", [False, True])
@pytest.mark.parametrize(("dims", "size"), [(1, (16,)), (2, (8, 4)), (3, (3, 8, 4))])
def test_dims(dims, size, resblock_updown, channels_last):
    unet = tiny_unet(dims=dims, image_size=size, resblock_updown=resblock_updown)
    x = torch.randn(2, 1, *size)
    t, labels = torch.tensor([1.0, 500.0]), torch.tensor([3, 9])
    with torch.no_grad():
        y = unet(x, t, labels)
        assert y.shape == x.shape
        assert unet.config.sample_shape == (1, *size)
        if channels_last and dims > 1:
            layout = torch.channels_last if dims == 2 else torch.channels_last_3d
            unet.to(memory_format=layout)
            torch.testing.assert_close(unet(x.to(memory_format=layout), t, labels), y, rtol=1e-4, atol=1e-5)
        # a sample does not depend on its neighbours in the batch
        torch.testing.assert_close(unet(x[1:], t[1:], labels[1:]), y[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"resblock_updown": True}, {}, {"conv_resample": False}], ids=str)
@pytest.mark.parametrize(("dims", "size"), [(1, (16,)), (2, (8, 4)), (3, (3, 8, 4))])
def test_autocast(dims, size, changes):
    unet = tiny_unet(dims=dims, image_size=size, **{"resblock_updown": False} | changes)
    x, t, labels = torch.randn(2, 1, *size), torch.tensor([1.0, 500.0]), torch.tensor([3, 9])
    with torch.autocast("cpu", torch.bfloat16):
        y = unet(x, t, labels)
    y.float().sum().backward()
    assert relative_error(y.float(), unet(x, t, labels)) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{"resblock_updown": True}, {"conv_resample": False}], ids=str)
@pytest.mark.parametrize(("dims", "size"), [(1, (16,)), (2, (8, 4)), (3, (3, 8, 4))])
def test_half_precision(dims, size, changes, dtype):
    unet = tiny_unet(dims=dims, image_size=size, **{"resblock_updown": False} | changes)
    x, t, labels = torch.randn(2, 1, *size), torch.tensor([1.0, 500.0]), torch.tensor([3, 9])
    exact = unet(x, t, labels)
    y = unet.to(dtype)(x.to(dtype), t, labels)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert relative_error(y.float(), exact) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_videos_of_half_precision_are_pooled_frame_by_frame(dtype):
    x = torch.randn(2, 3, 4, 6, 8).to(dtype).to(memory_format=torch.channels_last_3d)
    expected = torch.stack([downsample(frame) for frame in x.unbind(2)], 2)
    assert torch.equal(downsample(x), expected)
    assert expected.dtype == dtype


@pytest.mark.parametrize(
    ("dims", "spatial"), [(1, (6,)), (2, (4, 6)), (3, (3, 4, 6))], ids=["audio", "images", "video"]
)
def test_resampling_is_by_two_and_never_along_time(dims, spatial):
    x = torch.arange(2.0 * math.prod(spatial)).reshape(1, 2, *spatial)
    larger, resampled = x, range(2 if dims < 3 else 3, 2 + dims)
    for d in resampled:
        larger = larger.repeat_interleave(2, d)
    assert torch.equal(upsample(x), larger)
    assert torch.equal(downsample(larger), x)
    config = tiny_config(dims=dims, image_size=spatial, resblock_updown=False)
    smaller = [2, *(n // 2 if 2 + d in resampled else n for d, n in enumerate(spatial))]
    with torch.no_grad():
        assert list(Downsample(config, 2)(x).shape[1:]) == smaller
        assert Upsample(config, 2)(x).shape == larger.shape
        assert torch.equal(Upsample(dataclasses.replace(config, conv_resample=False), 2)(x), larger)


def test_times_become_sinusoids():
    """dim/2 cosines, then as many sines, of frequencies from 1 down to (nearly) 10⁻⁴; an odd dim ends in a zero."""
    times = [0.0, 1.0, -3.5, 1000.0]
    for dtype, wide in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        for dim in (6, 7):
            found = timestep_embedding(torch.tensor(times, dtype=dtype), dim)
            assert found.dtype == wide
            for row, t in zip(found.tolist(), times, strict=True):
                angles = [t * 10000 ** (-i / 3) for i in range(3)]
                expected = [*map(math.cos, angles), *map(math.sin, angles), *[0.0] * (dim % 2)]
                assert row == pytest.approx(expected, abs=1e-4)


def test_heads_divide_the_channels():
    """Their number, or the channels of one, from which the number follows."""
    unet, other = tiny_unet(num_heads=4, num_head_channels=None), tiny_unet(num_head_channels=16)
    assert unet.middle_block[1].num_heads == other.middle_block[1].num_heads == 4
    args = (torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([0]))
    assert torch.equal(unet(*args), other(*args))
    assert not torch.allclose(unet(*args), tiny_unet(num_head_channels=64)(*args))
    for heads in ({"num_head_channels": None, "num_heads": 3}, {"num_head_channels": 48}):  # the middle block attends
        with pytest.raises(ValueError, match="the heads must divide the 64 channels at factor 2, got num_head"):
            tiny_config(attention_resolutions=(), **heads)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_res_blocks", 0), ("num_res_blocks", 1.5), ("model_channels", "32"), ("in_channels", -1), ("dropout", 1.0)],
)
def test_sizes_are_numbers_of_things(field, value):
    with pytest.raises(ValueError, match=f"UNetConfig: {field} must be .* got {value!r}"):
        tiny_config(**{field: value})


def test_attention_is_where_it_is_asked_for():
    """At those resolutions, and always in the middle."""
    for resolutions, counts in (((), (0, 1, 0)), ((1,), (1, 1, 2)), ((2,), (1, 1, 2)), ((1, 2), (2, 1, 4))):
        unet = UNet(tiny_config(attention_resolutions=resolutions))
        parts = (unet.input_blocks, unet.middle_block, unet.output_blocks)
        assert tuple(sum(isinstance(m, AttentionBlock) for m in part.modules()) for part in parts) == counts


def test_sizes_of_a_sample():
    assert tiny_config(image_size=8).sample_shape == (1, 8, 8)
    assert tiny_config(image_size=[8, 4]).sample_shape == (1, 8, 4)
    assert tiny_config(image_size=8, dims=3).sample_shape == (1, 8, 8, 8)
    assert tiny_config(image_size=(3, 8, 4), dims=3).sample_shape == (1, 3, 8, 4)  # a video of any depth
    config = UNetConfig(image_size=16, model_channels=64, channel_mult=[0.5, 1, 2])
    assert (config.channels, config.downsampling) == ((32, 64, 128), (1, 2, 4))
    assert (config.sample_shape, config.out_channels) == ((3, 16, 16), 3)
    assert hash(config) == hash(UNetConfig(image_size=16, model_channels=64, channel_mult=(0.5, 1, 2)))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3, 12), (2, 12, 3)), ((2, 3, 8, 12), (2, 48, 2, 3)), ((2, 3, 5, 8, 12), (2, 48, 5, 2, 3))],
)
def test_patches_are_channels(shape, expected):
    x = torch.randn(shape)
    folded = fold_patches(x, 4)
    assert folded.shape == expected
    assert torch.equal(unfold_patches(folded, 4), x)
    assert fold_patches(x, 1) is x
    assert unfold_patches(x, 1) is x
    if len(shape) == 3:
        assert folded[0, :4, 2].tolist() == x[0, 0, 8:12].tolist()
    if len(shape) == 4:
        assert torch.equal(folded, F.pixel_unshuffle(x, 4))
    if len(shape) == 5:  # frame by frame
        assert torch.equal(folded[:, :, 3], F.pixel_unshuffle(x[:, :, 3], 4))


@pytest.mark.parametrize(("dims", "size"), [(1, 16), (2, (8, 16)), (3, (3, 8, 16))])
def test_a_network_of_patches_is_a_network_of_more_channels(dims, size):
    unet = tiny_unet(dims=dims, image_size=size, patch_size=2)
    assert unet.config.sample_shape == (1, *((size,) if dims == 1 else size))
    area = 2 ** min(dims, 2)
    inside = tiny_unet(dims=dims, image_size=size, in_channels=area, out_channels=area)
    inside.load_state_dict(unet.state_dict())
    x, t, y = torch.randn(2, *unet.config.sample_shape), torch.tensor([1.0, 5.0]), torch.tensor([1, 2])
    assert torch.equal(unet(x, t, y), unfold_patches(inside(fold_patches(x, 2), t, y), 2))
    with pytest.raises(ValueError, match="multiples of 4"):
        unet(x[..., :-2], t, y)


def test_resampling_without_weights():
    unet = tiny_unet(resblock_updown=False, conv_resample=False)
    assert not any(".op." in key or ".conv." in key for key in unet.state_dict())
    assert unet(torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([0])).shape == (1, 1, 8, 8)


def test_new_networks_give_zero():
    assert UNet(tiny_config())(torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([0])).abs().max() == 0


def test_float64_agrees_with_float32():
    unet = tiny_unet()
    x, t, labels = torch.randn(1, 1, 8, 8), torch.tensor([100.0]), torch.tensor([1])
    with torch.no_grad():
        single = unet(x, t, labels)
        double = unet.double()(x.double(), t.double(), labels)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    unet = tiny_unet().train()
    unet(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def plain_operators(patch):
    """The network in torch's own operators."""

    def group_norm(x, groups, weight, bias, eps, *, add=None, scale=None, shift=None, activation=None):
        u = torch.cat(x, 1) if isinstance(x, tuple) else x
        rows = u.shape[:2] + (1,) * (u.ndim - 2)
        y = F.group_norm(u if add is None else u + add.reshape(rows), groups, weight, bias, eps)
        y = y if scale is None else y * (1 + scale.reshape(rows)) + shift.reshape(rows)
        return y if activation is None else F.silu(y)

    patch.setattr(unet_module, "group_norm", group_norm)
    patch.setattr(unet_module, "attention", lambda q, k, v: torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v)


def double_case(**changes):
    """A network, its input and a direction, in float64."""
    unet = tiny_unet(**changes).double()
    g = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 2, 1, 8, 8, generator=g, dtype=torch.float64)
    return unet, (x, torch.tensor([0.3, 1.1]).double()), (dx, torch.tensor([0.7, -0.4]).double()), torch.tensor([1, 7])


@pytest.mark.parametrize("film", [True, False])
def test_jvp(film, monkeypatch):
    unet, inputs, direction, labels = double_case(use_scale_shift_norm=film, resblock_updown=film)

    def f(x, t):
        return unet(x, t, labels)

    value, tangent = jvp(f, inputs, direction)
    torch.testing.assert_close(value, f(*inputs))
    h = 1e-6
    ahead, behind = (f(*(i + s * d for i, d in zip(inputs, direction, strict=True))) for s in (h, -h))
    assert relative_error(tangent, (ahead - behind) / (2 * h)) < 1e-7
    plain_operators(monkeypatch)
    assert relative_error(tangent, jvp(f, inputs, direction)[1]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jvp_at_lower_precision(dtype, monkeypatch):
    unet, inputs, direction, labels = double_case()
    exact = jvp(lambda x, t: unet(x, t, labels), inputs, direction)[1]
    unet = unet.to(dtype)
    inputs, direction = ((x.to(dtype), t.float()) for x, t in (inputs, direction))

    def tangent():
        return jvp(lambda x, t: unet(x, t, labels), inputs, direction)[1]

    actual = tangent()
    assert actual.dtype == dtype
    plain_operators(monkeypatch)
    assert relative_error(actual.double(), exact) < 2 * relative_error(tangent().double(), exact)


def test_continuous_time_consistency_training(monkeypatch):
    """The gradient of an objective over the network's tangent, by torch.func and by backward.

    Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", stop the gradient of
    the tangent.
    """
    unet, inputs, direction, labels = double_case()
    parameters = dict(unet.named_parameters())

    def objective(parameters, stopped):
        network, tangent = jvp(lambda x, t: functional_call(unet, parameters, (x, t, labels)), inputs, direction)
        target = (network + tangent).detach() if stopped else tangent
        return (network - target).square().sum()

    for stopped in (True, False):
        actual = grad(objective)(parameters, stopped)
        unet.zero_grad()
        objective(parameters, stopped).backward()
        with monkeypatch.context() as patch:
            plain_operators(patch)
            expected = grad(objective)(parameters, stopped)
        scale = max(e.abs().max() for e in expected.values())
        assert scale > 0
        for name, parameter in parameters.items():
            assert (actual[name] - expected[name]).abs().max() < 1e-12 * scale
            assert (parameter.grad - expected[name]).abs().max() < 1e-12 * scale


def test_gradients_of_each_sample():
    unet, (x, t), _, labels = double_case()
    parameters = dict(unet.named_parameters())

    def loss(parameters, x, t, labels):
        return functional_call(unet, parameters, (x[None], t[None], labels[None])).square().sum()

    actual = vmap(grad(loss), (None, 0, 0, 0))(parameters, x, t, labels)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[i], t[i], labels[i]), parameters.values())
        for name, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(actual[name][i], e)


def test_dropout_acts_in_training_only():
    unet = tiny_unet(dropout=0.5)
    args = (torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([0]))
    assert torch.equal(unet(*args), unet(*args))
    unet.train()
    assert not torch.equal(unet(*args), unet(*args))


def test_compiles_into_one_graph():
    unet = tiny_unet()
    args = (torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([0]))
    with torch.no_grad():
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), unet(*args))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 4}, "dims must be"),
        ({"image_size": (8, 8, 8)}, "must have 2 lengths"),
        ({"model_channels": 48}, "multiple of 32"),
        ({"channel_mult": ()}, "multiple of 32"),
        ({"channel_mult": (1, 0)}, "multiple of 32"),
        ({"channel_mult": (1, -1)}, "multiple of 32"),
        ({"dims": 0}, "dims must be"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"num_head_channels": 48}, "heads must divide"),
        ({"num_head_channels": None, "num_heads": 7}, "heads must divide"),
        ({"dims": 2.0}, "dims must be 1, 2 or 3, got 2.0"),
        ({"dims": "2"}, "dims must be 1, 2 or 3, got '2'"),
        ({"image_size": 0}, "image_size must be whole numbers of at least 1, got 0"),
        ({"image_size": -8}, "image_size must be whole numbers of at least 1, got -8"),
        ({"image_size": (0, 8, 8), "dims": 3}, r"image_size must be whole numbers of at least 1, got \(0, 8, 8\)"),
        ({"image_size": (8.0, 8)}, r"image_size must be whole numbers of at least 1, got \(8.0, 8\)"),
        ({"image_size": 8.0}, "image_size must be a whole number, or one a dimension, got 8.0"),
        ({"image_size": None}, "image_size must be a whole number, or one a dimension, got None"),
        ({"image_size": 7}, r"2 levels need lengths that are multiples of 2, patch_size · 2.*, and image_size is 7"),
        ({"image_size": (8, 6), "patch_size": 2}, r"2 levels need .* multiples of 4, .* image_size is \(8, 6\)"),
        ({"channel_mult": 2}, "channel_mult must be a list of numbers, got 2"),
        ({"channel_mult": (1, "2")}, r"multiple of 32 channels, got .* channel_mult \(1, '2'\)"),
        ({"channel_mult": (1, math.nan)}, r"multiple of 32 channels, got .* channel_mult \(1, nan\)"),
        ({"attention_resolutions": 2}, "attention_resolutions must be a list of numbers, got 2"),
        ({"attention_resolutions": ([2],)}, r"attention_resolutions are .* factors of the levels, .* got \[2\]"),
        ({"use_scale_shift_norm": "false"}, "use_scale_shift_norm must be True or False, got 'false'"),
        ({"resblock_updown": None}, "resblock_updown must be True or False, got None"),
        ({"conv_resample": []}, r"conv_resample must be True or False, got \[\]"),
    ],
)
def test_configurations_that_make_no_network(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("shape", "t", "labels", "message"),
    [
        ((1, 3, 8, 8), 1, 1, r"expected x \[N, 1"),
        ((1, 1, 8, 7), 1, 1, "multiples of 2"),
        ((1, 1, 7, 8), 1, 1, "multiples of 2"),
        ((1, 1, 8), 1, 1, r"expected x \[N, 1"),
        ((2, 1, 8, 8), 1, 2, r"timesteps \[2\]"),
        ((1, 1, 8, 8), 1, None, "expected class_labels"),
        ((2, 1, 8, 8), 2, 1, r"class_labels \[2\]"),
    ],
)
def test_inputs_of_the_wrong_size(shape, t, labels, message):
    labels = None if labels is None else torch.zeros(labels, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        tiny_unet()(torch.randn(shape), torch.ones(t), labels)


def test_labels_for_an_unconditional_network():
    with pytest.raises(ValueError, match="no class_labels"):
        tiny_unet(num_classes=None)(torch.randn(1, 1, 8, 8), torch.ones(1), torch.tensor([0]))
