"""The operators for inference without torch's dispatcher: as test_direct.py has it for those that have gradients."""

import sys

import pytest
import torch
from cmfast.kernels import (
    apply_group_norm,
    attention,
    backends,
    channel_moments,
    channel_norm,
    consistency_step,
    conv2d,
    direct,
    fold_group_norm,
    group_norm,
    prepare_conv,
    timestep_embedding,
)

from .test_direct import CHANNELS_LAST, NOT_PLAIN, SITUATIONS, default, long_way, normal, rows  # noqa: F401

SHAPES = [(2, 64, 5, 7), (1, 32, 4, 4), (3, 32), (2, 64, 9), (1, 64, 2, 3, 4), (2, 64, 1, 1), (2, 1, 3, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMAGE = normal(2, 32, 4, 6, layout=CHANNELS_LAST)
MOMENTS = torch.stack((normal(2, 32), normal(2, 32).abs() + 1), 1)
ROW, ROWS = normal(32), normal(2, 32)
PREPARED = prepare_conv(normal(32, 32, 3, 3), ROW, padding=1, height=4, width=6)
TIMES, FREQUENCIES = normal(3), normal(5).abs()
PLAIN = {
    "channel_moments": lambda x: channel_moments(x),
    "fold_group_norm": lambda x: fold_group_norm(MOMENTS, 24, 8, ROW, ROW, scale=x[:, :, 0, 0].contiguous()),
    "apply_group_norm": lambda x: apply_group_norm(x, MOMENTS, 8, ROW, ROW),
    "channel_norm": lambda x: channel_norm(x, ROW),
    "conv2d": lambda x: conv2d(x, PREPARED),
    "timestep_embedding": lambda x: timestep_embedding(x[0, :, 0, 0].contiguous(), FREQUENCIES),
}


@pytest.fixture
def refused(monkeypatch):
    """Whether a call was refused by the short way, which the long way then served."""
    calls = []
    ran = direct.plain.ran

    def watched(name, *arguments):
        calls.append(ran(name, *arguments))
        return calls[-1]

    monkeypatch.setattr(direct.plain, "ran", watched)

    def refused(call):
        calls.clear()
        call()
        return not any(calls)

    return refused


def tensors(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def assert_same(monkeypatch, refused, call):
    """That the short way serves the call, and what it gives is what the long way gives."""
    assert not refused(call)
    for found, expected in zip(tensors(call()), tensors(long_way(monkeypatch, call)), strict=True):
        assert torch.equal(found, expected)
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert found.device == expected.device


def image(shape, dtype=torch.float32, last=False):
    x = normal(*shape, dtype=dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


with_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@with_layouts
@of_dtypes
@of_shapes
def test_moments(monkeypatch, refused, shape, dtype, last):
    x = image(shape, dtype, last)
    assert_same(monkeypatch, refused, lambda: channel_moments(x))


@with_layouts
@of_dtypes
@of_shapes
def test_channel_norm(monkeypatch, refused, shape, dtype, last):
    x, (n, c) = image(shape, dtype, last), shape[:2]
    film = {"scale": normal(n, c), "shift": normal(n, c).bfloat16(), "activation": "silu"}
    for given in ({}, {"weight": normal(c), "bias": normal(c).bfloat16()}, {"centred": False, "eps": 0, "least": 0.1}):
        assert_same(monkeypatch, refused, lambda: channel_norm(x, **given))  # noqa: B023
        assert_same(monkeypatch, refused, lambda: channel_norm(x, **given, **film))  # noqa: B023


@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
@with_layouts
@of_dtypes
@of_shapes
def test_apply_group_norm(monkeypatch, refused, shape, dtype, last, pair):
    if pair and not last and shape[1] == 1:
        pytest.skip("one is channels last, and the other is not: the long way copies it")
    channels = [shape[1], 3 * shape[1]] if pair else [shape[1]]
    images = tuple(image((shape[0], c, *shape[2:]), dtype, last) for c in channels)
    moments = tuple(channel_moments(x) for x in images)
    given = rows(shape[0], sum(channels))
    weight, bias = given.pop("weight"), given.pop("bias").bfloat16()
    x, m = (images, moments) if pair else (images[0], moments[0])
    assert_same(monkeypatch, refused, lambda: apply_group_norm(x, m, 1, weight, bias))
    assert_same(monkeypatch, refused, lambda: apply_group_norm(x, m, 1, weight, bias, **given, activation="silu"))
    assert_same(monkeypatch, refused, lambda: fold_group_norm(m, 24, 1, weight, bias, 1e-3))
    assert_same(monkeypatch, refused, lambda: fold_group_norm(m, 24, 1, weight, bias, **given))


CONVOLUTIONS = {  # shape of x, of the weights, and how they are prepared
    "1x1": ((2, 16, 5, 7), (24, 16, 1, 1), {}),
    "3x3": ((2, 16, 5, 7), (24, 16, 3, 3), {"padding": 1}),
    "3x3 of stride 2": ((2, 16, 5, 7), (24, 16, 3, 3), {"stride": (2, 1), "padding": (0, 1, 1, 0)}),
    "one channel": ((2, 1, 5, 7), (1, 1, 3, 3), {"padding": 1}),
    "audio": ((2, 16, 9), (24, 16, 3), {"padding": 1}),
    "video": ((1, 16, 3, 5, 7), (24, 16, 3, 3, 3), {"padding": 1, "stride": (2, 1, 1)}),
}


@with_layouts
@of_dtypes
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(monkeypatch, refused, name, products, dtype, last):
    shape, weights, options = CONVOLUTIONS[name]
    dims, (n, c) = len(shape) - 2, shape[:2]
    sizes = dict(zip(("depth", "height", "width")[3 - dims :], shape[2:], strict=True))
    x = image(shape, dtype, last)
    affine = {"gain": normal(n, c), "offset": normal(n, c).bfloat16(), "silu": True}
    for bias in (None, normal(weights[0]), normal(weights[0]).bfloat16()):
        prepared = prepare_conv(normal(*weights), bias, dtype=products, **options, **sizes)
        y = conv2d(x, prepared).out
        assert_same(monkeypatch, refused, lambda: conv2d(x, prepared))  # noqa: B023
        residual = image(y.shape, dtype, not last)
        given = {"residual": residual, "moments": True, "relu": True}
        assert_same(monkeypatch, refused, lambda: conv2d(x, prepared, **affine, **given))  # noqa: B023
    if c > 1:
        pair = tuple(image(half.shape, dtype, last) for half in x.split(c // 2, 1))
        assert_same(monkeypatch, refused, lambda: conv2d(pair, prepared, moments=True))
    assert_same(monkeypatch, refused, lambda: conv2d((x, x), prepared, gate="gelu"))


@pytest.mark.parametrize("resample", ["nearest", "average"])
@pytest.mark.parametrize("shape", [(2, 16, 4, 6), (2, 16, 6), (1, 16, 3, 4, 6)], ids=str)
def test_resampled_convolutions(monkeypatch, refused, shape, resample):
    dims = len(shape) - 2
    prepared = prepare_conv(normal(8, 16, *(3,) * dims), padding=1, width=6)
    x = image(shape, last=True)
    y = conv2d(x, prepared, resample=resample).out
    assert_same(monkeypatch, refused, lambda: conv2d(x, prepared, resample=resample))
    other = {"nearest": "average", "average": "nearest"}[resample]
    large = conv2d(y, prepare_conv(normal(8, 8, *(1,) * dims), width=6), resample=other).out
    given = {"resample": resample, "residual": large, "residual_resample": resample}
    if large.shape[2:] == x.shape[2:]:
        assert_same(monkeypatch, refused, lambda: conv2d(x, prepared, **given))
        assert refused(lambda: long_way(monkeypatch, lambda: conv2d(x, prepared, **given)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8], ids=str)
def test_timestep_embedding(monkeypatch, refused, dtype):
    t = (100 * normal(4).abs()).to(dtype)
    for given in ({}, {"scale": 2.5, "sin_first": True}, {"scale": 3}):
        assert_same(monkeypatch, refused, lambda: timestep_embedding(t, normal(37).to(DTYPES[1]), **given))  # noqa: B023
        assert_same(monkeypatch, refused, lambda: timestep_embedding(t[::2], FREQUENCIES, **given))  # noqa: B023


@pytest.mark.parametrize("name", PLAIN)
def test_the_short_way_asks_nobody(monkeypatch, name):
    def refuse(*arguments):
        raise AssertionError("the long way")

    for module in ("moments", "apply_group_norm", "channel_norm", "conv", "timestep_embedding"):
        monkeypatch.setattr(sys.modules[f"cmfast.kernels.{module}"], "resolve", refuse)
    PLAIN[name](IMAGE)
    PLAIN[name](IMAGE.clone().requires_grad_().detach())
    with torch.no_grad():
        PLAIN[name](IMAGE.clone().requires_grad_())
    with torch.inference_mode():
        PLAIN[name](IMAGE.clone())


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_whoever_has_to_know_of_a_call_does(refused, name, situation):
    with SITUATIONS[situation]():
        if situation == "forward mode":
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                PLAIN[name](IMAGE)
        elif situation == "kernels of GPUs on the processor":
            pass  # which are not there without an emulation
        elif situation == "fake tensors":
            assert refused(lambda: error_of(lambda: PLAIN[name](IMAGE)))  # which do not mix with others
        else:
            assert refused(lambda: PLAIN[name](IMAGE))


@pytest.mark.parametrize("name", PLAIN)
def test_a_gradient_is_refused_as_ever(name):
    with pytest.raises(RuntimeError, match="inference: call it under"):
        PLAIN[name](IMAGE.clone().requires_grad_())


@pytest.mark.parametrize("make", ["negated", "a subclass", "float64", "empty"])
@pytest.mark.parametrize("name", ["channel_moments", "channel_norm", "conv2d", "apply_group_norm"])
def test_other_tensors_take_the_long_way(refused, name, make):
    x = NOT_PLAIN[make](IMAGE)
    calls = {**PLAIN, "apply_group_norm": lambda x: apply_group_norm(x, MOMENTS[: len(x)], 8, ROW, ROW)}
    assert refused(lambda: calls[name](x))


def test_unusual_strides_give_the_same(monkeypatch):
    """By whichever way."""
    wide = normal(4, 64, 6, 8, layout=CHANNELS_LAST)
    prepared = prepare_conv(normal(16, 32, 3, 3), padding=1, height=6, width=8)
    for x in (
        wide[:, ::2],
        wide[:, 3:35],
        wide[:, :32, ::2],
        wide[:, :32, :, 1:6],
        wide[:, :32].transpose(2, 3),
        wide[:, :32, :1].expand(4, 32, 6, 8),
        wide.contiguous()[:, :32, :, 1:6],
        wide[:1, :32].expand(4, 32, 6, 8),
        wide[:, :1].expand(4, 32, 6, 8),
        wide[:, :32, :, :1].expand(4, 32, 6, 8),
        wide.contiguous()[:, :32, :, :1].expand(4, 32, 6, 8),
        wide[:, :32, :1, :1].expand(4, 32, 6, 8),
    ):
        moments = channel_moments(x, backend="cpu")
        for call in (
            lambda: channel_moments(x),  # noqa: B023
            lambda: channel_norm(x, ROW),  # noqa: B023
            lambda: apply_group_norm(x, moments, 4, ROW, ROW),  # noqa: B023
            lambda: conv2d(x, prepared, moments=True),  # noqa: B023
        ):
            for found, expected in zip(tensors(call()), tensors(long_way(monkeypatch, call)), strict=True):
                assert torch.equal(found, expected)
                assert found.stride() == expected.stride()


BAD = {
    "moments of integers": lambda: channel_moments(IMAGE.long()),
    "moments of a row": lambda: channel_moments(ROW),
    "moments of no positions": lambda: channel_moments(IMAGE[:, :, :0]),
    "fold of float64": lambda: fold_group_norm(MOMENTS.double(), 24, 8, ROW, ROW),
    "fold of other moments": lambda: fold_group_norm(MOMENTS[:, :1], 24, 8, ROW, ROW),
    "fold of other samples": lambda: fold_group_norm((MOMENTS, MOMENTS[:1]), 24, 8, normal(64), normal(64)),
    "fold of no size": lambda: fold_group_norm(MOMENTS, 0, 8, ROW, ROW),
    "fold of five groups": lambda: fold_group_norm(MOMENTS, 24, 5, ROW, ROW),
    "fold of another weight": lambda: fold_group_norm(MOMENTS, 24, 8, normal(31), ROW),
    "fold of integers": lambda: fold_group_norm(MOMENTS, 24, 8, ROW.long(), ROW),
    "fold without a weight": lambda: fold_group_norm(MOMENTS, 24, 8, None, ROW),
    "fold without a bias": lambda: fold_group_norm(MOMENTS, 24, 8, ROW, None),
    "apply without a weight": lambda: apply_group_norm(IMAGE, MOMENTS, 8, None, ROW),
    "apply without a bias": lambda: apply_group_norm(IMAGE, MOMENTS, 8, ROW, None),
    "apply to a pair of one's moments": lambda: apply_group_norm((IMAGE, IMAGE), MOMENTS, 8, normal(64), normal(64)),
    "apply to one of a pair's moments": lambda: apply_group_norm(IMAGE, (MOMENTS, MOMENTS), 8, ROW, ROW),
    "apply other moments": lambda: apply_group_norm(IMAGE, MOMENTS[:1], 8, ROW, ROW),
    "apply gelu": lambda: apply_group_norm(IMAGE, MOMENTS, 8, ROW, ROW, activation="gelu"),
    "apply nearest": lambda: apply_group_norm(IMAGE, MOMENTS, 8, ROW, ROW, resample="nearest"),
    "apply zero groups": lambda: apply_group_norm(IMAGE, MOMENTS, 0, ROW, ROW),
    "norm of a row": lambda: channel_norm(ROW),
    "norm of another weight": lambda: channel_norm(IMAGE, ROWS),
    "norm of another scale": lambda: channel_norm(IMAGE, scale=ROW),
    "norm and gelu": lambda: channel_norm(IMAGE, activation="gelu"),
    "norm of a negative eps": lambda: channel_norm(IMAGE, eps=-1e-50),
    "norm of a negative least": lambda: channel_norm(IMAGE, least=-1.0),
    "norm of an eps that is no number": lambda: channel_norm(IMAGE, eps="1e-5"),
    "convolution of other channels": lambda: conv2d(IMAGE[:, :31], PREPARED),
    "convolution of a row": lambda: conv2d(ROWS, PREPARED),
    "convolution of integers": lambda: conv2d(IMAGE.long(), PREPARED),
    "convolution of a large kernel": lambda: conv2d(IMAGE, prepare_conv(normal(8, 32, 9, 9), height=9, width=9)),
    "convolution without offset": lambda: conv2d(IMAGE, PREPARED, gain=ROWS),
    "convolution of another gain": lambda: conv2d(IMAGE, PREPARED, gain=ROW, offset=ROWS),
    "convolution of an unknown gate": lambda: conv2d((IMAGE, IMAGE), PREPARED, gate="relu"),
    "convolution of no gate": lambda: conv2d(IMAGE, PREPARED, gate="gelu"),
    "convolution of a gate and SiLU": lambda: conv2d((IMAGE, IMAGE), PREPARED, gate="gelu", silu=True),
    "convolution of another gate": lambda: conv2d((IMAGE, IMAGE[:, :8]), PREPARED, gate="gelu"),
    "convolution of an unequal pair": lambda: conv2d((IMAGE[:, :8], IMAGE[:1, 8:]), PREPARED),
    "convolution, resampled as nobody knows": lambda: conv2d(IMAGE, PREPARED, resample="bilinear"),
    "convolution, resampled by a list": lambda: conv2d(IMAGE, PREPARED, resample=["nearest"]),
    "residual of another shape": lambda: conv2d(IMAGE, PREPARED, residual=IMAGE[:, :, :2]),
    "residual of another dtype": lambda: conv2d(IMAGE, PREPARED, residual=IMAGE.half()),
    "residual of fewer dimensions": lambda: conv2d(IMAGE, PREPARED, residual=ROWS),
    "residual that is not there": lambda: conv2d(IMAGE, PREPARED, residual_resample="nearest"),
    "timesteps of two dimensions": lambda: timestep_embedding(ROWS, FREQUENCIES),
    "timesteps that are true": lambda: timestep_embedding(TIMES > 0, FREQUENCIES),
    "frequencies that are integers": lambda: timestep_embedding(TIMES, FREQUENCIES.long()),
    "scale that is no number": lambda: timestep_embedding(TIMES, FREQUENCIES, scale="one"),
    "a step without an output": lambda: consistency_step(IMAGE, None, 0.5, 0.5),
    "a step of another shape": lambda: consistency_step(IMAGE, IMAGE[:1], 0.5, 0.5),
    "a step of integers": lambda: consistency_step(IMAGE, IMAGE.long(), 0.5, 0.5),
    "a step of a row": lambda: consistency_step(ROW, ROW, 0.5, 0.5),
}


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("there was no error")


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_errors_are_those_of_the_long_way(monkeypatch, call):
    assert error_of(call) == long_way(monkeypatch, lambda: error_of(call))


@torch.no_grad()
def test_a_recorded_operator_is_what_its_call_is():
    film = (None, ROWS, ROWS)
    fold = (MOMENTS, None, 24, 8, ROW, ROW, 1e-5, *film)
    operators = {
        "channel_moments": (IMAGE,),
        "fold_group_norm": fold,
        "apply_group_norm": (IMAGE, None, MOMENTS, None, 8, ROW, ROW, 1e-5, *film, True, None),
        "channel_norm": (IMAGE, ROW, None, 1e-5, True, 0.0, None, None, True),
        "conv2d": (IMAGE, None, *PREPARED[:5], [*PREPARED.stride], [*PREPARED.padding], PREPARED.dtype),
        "timestep_embedding": (TIMES, FREQUENCIES, 1.0, False),
    }
    operators["conv2d"] += (None, None, None, False, None, None, None, False, False)
    assert set(operators) == set(PLAIN)
    for name, arguments in operators.items():
        found = direct.of_operator(name, (*arguments, None))
        expected = getattr(torch.ops.cmfast, name)(*arguments, None)
        for mine, other in zip(tensors(found), tensors(expected), strict=True):
            assert torch.equal(mine, other)
        assert direct.of_operator(name, (*arguments, "cpu")) is None


STEPS = {
    "group_norm": lambda: group_norm(IMAGE, 8, ROW, ROW, scale=ROWS, shift=ROWS, activation="silu"),
    "attention": lambda: attention(IMAGE, IMAGE, IMAGE),
    "consistency_step": lambda: consistency_step(IMAGE, IMAGE, 0.5, 0.5, alpha=1.0, beta=0.5, seed=3, input_scale=2.0),
    **{name: lambda name=name: PLAIN[name](IMAGE) for name in PLAIN},
    "conv2d": lambda: conv2d(IMAGE, PREPARED, gain=ROWS, offset=ROWS, silu=True, residual=IMAGE, moments=True),
}


def calls_of_python(call):
    """Functions of Python, and of C, that a call calls: what it costs the host, whatever else the machine does."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@torch.no_grad()
@pytest.mark.parametrize("name", STEPS)
def test_a_call_takes_few_steps(monkeypatch, name):
    short = calls_of_python(STEPS[name])
    assert short <= 60
    assert long_way(monkeypatch, lambda: calls_of_python(STEPS[name])) > 1.5 * short


def test_every_operator_for_inference_is_here():
    operators = {name for name in backends.OPERATORS if not name.endswith("backward")}
    assert set(STEPS) == operators


def test_a_pair_of_which_one_is_expanded_along_its_last_dimension(monkeypatch):
    h, skip = normal(2, 4, 5, 4), normal(2, 4, 5, 1).expand(2, 4, 5, 4)

    def call():
        return group_norm((h, skip), 2)

    (found,), (expected,) = tensors(call()), tensors(long_way(monkeypatch, call))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
