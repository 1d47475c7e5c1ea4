import pytest
import torch
from cmfast.kernels import backends, channel_moments, conv2d, fold_group_norm, group_norm, prepare_conv
from hypothesis import given, settings
from hypothesis import strategies as st

from .backends import served
from .memory import guarded

pytestmark = pytest.mark.usefixtures("fewer_programs")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# N, C, *spatial: whole registers and chunks of positions, and one more or less of each
SHAPES = {
    "whole": (2, 64, 16, 16),
    "odd": (3, 67, 9, 15),
    "few-channels": (1, 3, 33, 8),
    "one-channel": (2, 1, 5, 7),
    "one-position": (2, 20, 1, 1),
    "no-space": (3, 21),
    "audio": (2, 35, 257),
    "video": (1, 18, 3, 5, 7),
}


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def exact_moments(x):
    values = x.double().flatten(2) if x.ndim > 2 else x.double()[..., None]
    mean = values.mean(2)
    return torch.stack((mean, (values - mean[..., None]).square().sum(2)), 1)


def check_moments(x, backend):
    moments, exact = channel_moments(x, backend=backend), exact_moments(x)
    assert moments.dtype == torch.float32
    assert moments.shape == exact.shape
    # The sums are of values less the first of their chunk, which may lie some deviations from their mean.
    spread = (exact[:, 1] / max(1, x.shape[2:].numel())).sqrt()
    assert ((moments[:, 0] - exact[:, 0]).abs() <= 2e-7 * exact[:, 0].abs() + 2e-6 * spread).all()
    assert ((moments[:, 1] - exact[:, 1]).abs() <= 2e-5 * exact[:, 1] + 1e-12).all()


@pytest.mark.parametrize("backend", served("channel_moments"))
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moments(shape, dtype, layout, backend):
    check_moments(guarded(draw(*shape).to(dtype), layout), backend)


@pytest.mark.parametrize("backend", served("channel_moments"))
def test_moments_of_a_large_mean(backend):
    x = guarded(draw(2, 35, 20, 20) + 1000, "l")
    if backend != "reference":  # whose mean is rounded before it is subtracted
        check_moments(x, backend)


@pytest.mark.parametrize("backend", served("channel_moments"))
def test_moments_of_views(backend):
    x = draw(4, 30, 12, 10).to(memory_format=torch.channels_last)
    for view in (x[:, :7], x[:, 5:21], x[:, :, 2:9], x[:, :, :, 1:4], x[::2], x[:, ::2], x.transpose(2, 3)):
        check_moments(view, backend)
    check_moments(x[:, :, :1].expand(4, 30, 12, 10), backend)
    assert channel_moments(x[:0], backend=backend).shape == (0, 2, 30)


def _of_conv2d(backend):
    """The backend itself, or whichever serves a convolution where it has no kernel for one."""
    return backend if backends.available(backend, "conv2d")[0] else None


@pytest.mark.parametrize("backend", served("channel_moments"))
def test_they_are_those_of_conv2d(backend):
    x, weight = draw(2, 8, 9, 7).to(memory_format=torch.channels_last), draw(21, 8, 3, 3, seed=1)
    prepared = prepare_conv(weight, padding=1, height=9, width=7)
    y, moments = conv2d(x, prepared, moments=True, backend=_of_conv2d(backend))
    torch.testing.assert_close(channel_moments(y, backend=backend), moments)


def make(n, channels, spatial, groups, parts=(), pair=0, mean=0.0, seed=0):
    """x [N, C, *spatial], its moments or a pair of them, and the arguments with NaN around those of a row a sample."""
    x = draw(n, channels, *spatial, seed=seed) * 2 + mean + draw(channels, 1, 1, seed=seed + 1)
    moments = exact_moments(x).float()
    if pair:
        moments = guarded(moments[..., :pair]), guarded(moments[..., pair:])
    rows = draw(2, channels, seed=seed + 2).unbind()
    wide = torch.full((n, 3 * channels + 5), torch.nan)
    arguments = {}
    for i, name in enumerate(("add", "scale", "shift")):
        if name in parts:
            arguments[name] = wide[:, i * channels : (i + 1) * channels]  # rows apart, as one linear layer makes them
            arguments[name].copy_(draw(n, channels, seed=seed + 3 + i))
    return x, moments, rows, arguments


def check_fold(n, channels, spatial, groups, backend, parts=(), pair=0, mean=0.0, seed=0):
    x, moments, rows, arguments = make(n, channels, spatial, groups, parts, pair, mean, seed)
    gain, offset = fold_group_norm(moments, x.shape[2:].numel(), groups, *rows, 1e-5, **arguments, backend=backend)
    assert gain.shape == offset.shape == (n, channels)
    wide = {name: t.double() for name, t in arguments.items()}
    exact = group_norm(x.double(), groups, *(t.double() for t in rows), 1e-5, **wide, backend="reference")
    gain, offset = (t.double()[..., None, None] for t in (gain, offset))
    # Gain and offset are rounded once, and so were the moments that they are made of.
    allowed = 1e-6 * ((x.double() * gain).abs() + offset.abs()) + 1e-6
    assert ((x.double() * gain + offset - exact).abs() <= allowed).all()


@pytest.mark.parametrize("backend", served("fold_group_norm"))
@pytest.mark.parametrize("parts", [(), ("add",), ("scale", "shift"), ("add", "scale", "shift")], ids="-".join)
@pytest.mark.parametrize("pair", [0, 1, 13, 29])
@pytest.mark.parametrize("groups", [1, 3, 10, 30])
def test_fold(groups, pair, parts, backend):
    check_fold(2, 30, (5, 7), groups, backend, parts, pair)


@pytest.mark.parametrize("backend", served("fold_group_norm"))
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_fold_of_a_large_mean(mean, backend):
    check_fold(1, 96, (16, 16), 32, backend, ("add",), 64, mean)


@pytest.mark.parametrize("backend", served("fold_group_norm"))
@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 33),
    size=st.integers(1, 30),
    height=st.integers(1, 8),
    width=st.integers(2, 8),
    parts=st.sets(st.sampled_from(["add", "scale", "shift"])),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_fold_drawn(backend, n, groups, size, height, width, parts, seed, data):
    pair = data.draw(st.integers(0, groups * size - 1))
    check_fold(n, groups * size, (height, width), groups, backend, parts, pair, 0.0, seed)


@pytest.mark.parametrize("backend", served("fold_group_norm"))
def test_fold_takes_other_dtypes_and_strides(backend):
    _, moments, rows, arguments = make(2, 12, (4, 4), 3, ("add", "scale", "shift"))
    half = {name: t.half() for name, t in arguments.items()}
    expected = fold_group_norm(moments, 16, 3, *rows, **{k: t.float() for k, t in half.items()}, backend=backend)
    apart = {name: t.mT.contiguous().mT for name, t in half.items()}
    strided = torch.stack(rows, 1).unbind(1)
    spread = moments.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for actual in (
        fold_group_norm(moments, 16, 3, *rows, **half, backend=backend),
        fold_group_norm(spread, 16, 3, *strided, **apart, backend=backend),
    ):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert fold_group_norm(moments[:0], 16, 3, *rows, backend=backend)[0].shape == (0, 12)


@pytest.mark.parametrize("backend", served("fold_group_norm"))
def test_opcheck(backend):
    for layout in ("c", "l"):
        x = guarded(draw(2, 6, 5, 4), layout)
        torch.library.opcheck(torch.ops.cmfast.channel_moments.default, (x, backend))
    _, moments, rows, a = make(2, 12, (4, 4), 3, ("add", "scale", "shift"), 5)
    arguments = (*moments, 16, 3, *rows, 1e-5, a["add"], a["scale"], a["shift"], backend)
    torch.library.opcheck(torch.ops.cmfast.fold_group_norm.default, arguments)


M, C = torch.ones(2, 2, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: channel_moments(C), r"x must be .* got \[6\] float32"),
        (lambda: channel_moments(M.long()), "x must be"),
        (lambda: channel_moments(M[:, :, :0]), "x must be"),
        (lambda: fold_group_norm(M[0], 4, 2, C, C), r"moments must be float32 \[N, 2, C\]"),
        (lambda: fold_group_norm(M.double(), 4, 2, C, C), "moments must be"),
        (lambda: fold_group_norm((M, M.half()), 4, 2, C, C), "moments must be"),
        (lambda: fold_group_norm((M, M[:1]), 4, 2, C, C), "must agree in N"),
        (lambda: fold_group_norm(M, 0, 2, C, C), "size must be positive"),
        (lambda: fold_group_norm(M, 4, 4, C, C), "num_groups must divide .* got 4 for 6"),
        (lambda: fold_group_norm(M, 4, 2, C[:5], C), r"weight must be floating point \[6\]"),
        (lambda: fold_group_norm(M, 4, 2, C, C.long()), "bias must be"),
        (lambda: fold_group_norm(M, 4, 2, C, C, add=C), r"add must be floating point \[2, 6\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_there_are_no_gradients():
    with pytest.raises(RuntimeError, match="serves inference"):
        channel_moments(torch.ones(1, 2, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="serves inference"):
        fold_group_norm(M, 4, 2, C.clone().requires_grad_(), C)


@pytest.mark.parametrize("backend", served("channel_moments"))
def test_sums_that_overflow_are_not_taken_for_none(backend):
    """A deviation of 0 would be a plausible one."""
    x = draw(1, 20, 9, 8) * 1e20
    assert not torch.isfinite(channel_moments(x, backend=backend)[:, 1]).any()
    far = torch.full((1, 20, 9, 8), 2e18)  # the square of whose sum overflows, though no sum of squares does
    far[..., 0, 0] = 0.0
    torch.testing.assert_close(channel_moments(far, backend=backend).double(), exact_moments(far), rtol=1e-3, atol=0)
