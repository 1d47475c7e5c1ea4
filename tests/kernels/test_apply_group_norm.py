import pytest
import torch
from cmfast.kernels import apply_group_norm, channel_moments, group_norm
from cmfast.kernels.layout import accumulation_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from .backends import served
from .memory import guarded
from .tolerance import assert_as_accurate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# N, C, *spatial; groups; channels of the first of a pair: whole vectors and tiles, and others
SHAPES = {
    "whole": ((2, 64, 16, 16), 8, 32),
    "odd": ((3, 66, 9, 15), 11, 13),
    "few-channels": ((1, 3, 33, 8), 3, 1),
    "one-channel": ((2, 1, 5, 7), 1, 0),
    "to-one-position": ((2, 20, 2, 3), 5, 8),
    "audio": ((2, 36, 129), 4, 5),
    "video": ((1, 18, 3, 5, 7), 3, 7),
}
PARTS = ("add", "scale", "shift")
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: lambda y, _: F.avg_pool3d(y, (1, 2, 2))}
BACKENDS = served("apply_group_norm")

pytestmark = pytest.mark.usefixtures("fewer_programs")


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make(shape, dtype=torch.float32, layout="c", pair=0, parts=PARTS, mean=0.7, seed=0):
    """x or a pair, its moments or a pair of them, weight and bias, and the other arguments, all with NaN around."""
    n, c = shape[:2]
    x = (draw(*shape, seed=seed) * 2 + draw(c, *(1,) * (len(shape) - 2), seed=seed + 1) + mean).to(dtype)
    tensors = x.split([pair, c - pair], 1) if pair else (x,)
    moments = [guarded(channel_moments(t, backend="reference")) for t in tensors]
    tensors = [guarded(t, layout) for t in tensors]
    rows = [guarded(row.to(dtype)) for row in draw(2, c, seed=seed + 2)]
    arguments = {name: guarded(draw(n, c, seed=seed + 3 + i).to(dtype)) for i, name in enumerate(parts)}
    return (tuple(tensors), tuple(moments), rows, arguments) if pair else (*tensors, *moments, rows, arguments)


def by_group_norm(x, groups, rows, arguments, activation, resample):
    y = group_norm(x, groups, *rows, **arguments, activation=activation, backend="reference")
    return y if resample is None else POOL[y.ndim - 2](y.to(accumulation_dtype(y.dtype)), 2).to(y.dtype)


def wide(x):
    if isinstance(x, dict):
        return {name: t.double() for name, t in x.items()}
    return [t.double() for t in x] if isinstance(x, list | tuple) else x.double()


def check(x, moments, groups, rows, arguments, backend, activation="silu", resample=None):
    y = apply_group_norm(
        x, moments, groups, *rows, **arguments, activation=activation, resample=resample, backend=backend
    )
    exact = by_group_norm(wide(x), groups, wide(rows), wide(arguments), activation, resample)
    plain = by_group_norm(x, groups, rows, arguments, activation, resample)
    assert_as_accurate("y", y, exact, plain, 2e-6)
    h = x[0] if isinstance(x, tuple) else x
    last = h.stride(1) == 1 or h.shape[1] == 1
    assert (y.movedim(1, -1) if last else y).is_contiguous()
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, layout, backend):
    shape, groups, pair = SHAPES[shape]
    x, moments, rows, arguments = make(shape, dtype, layout)
    check(x, moments, groups, rows, {}, backend, None)
    x, moments, rows, arguments = make(shape, dtype, layout, pair)
    check(x, moments, groups, rows, arguments, backend, "silu", "average")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [0, 1, 13, 29])
@pytest.mark.parametrize("groups", [1, 3, 10, 30])
def test_groups_cross_the_seam(groups, pair, backend):
    x, moments, rows, arguments = make((2, 30, 4, 5), torch.float32, "l", pair)
    check(x, moments, groups, rows, arguments, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [*PARTS, "silu"])
def test_each_part_alone(part, backend):
    x, moments, rows, arguments = make((2, 12, 4, 5), torch.float32, "l", 5, (part,) if part in PARTS else ())
    check(x, moments, 3, rows, arguments, backend, "silu" if part == "silu" else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 100.0), (torch.bfloat16, 20.0)], ids=str)
def test_large_mean(dtype, mean, backend):
    x, moments, rows, arguments = make((1, 96, 8, 8), dtype, "l", 64, ("add",), mean)
    y = apply_group_norm(x, moments, 32, *rows, **arguments, backend=backend)
    exact = by_group_norm(wide(x), 32, wide(rows), wide(arguments), None, None)
    # The definition and the kernels of 16 bits multiply x itself, of which its mean is a large part.
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2e-6 * mean).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    wide_x = draw(4, 24, 10, 8).to(memory_format=torch.channels_last)
    _, _, rows, _ = make((4, 12, 1, 1))
    for x in (
        wide_x[:, :12],
        wide_x[:, 5:17],
        wide_x[:, ::2],
        wide_x[:, :12, 2:9],
        wide_x[:, :12, :, 1:6],
        wide_x[:, :12].transpose(2, 3),
        wide_x[:, :12, :1].expand(4, 12, 6, 8),
        wide_x.contiguous()[:, :12, :, 1:6],
        (wide_x[:, :5], wide_x[:, 8:15].contiguous()),
        (wide_x[:, :5].contiguous(), wide_x[:, 8:15]),
    ):
        moments = [channel_moments(t, backend="reference") for t in (x if isinstance(x, tuple) else (x,))]
        for resample in (None, "average"):
            check(x, moments if len(moments) > 1 else moments[0], 4, rows, {}, backend, "silu", resample)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_and_strides(backend):
    x, moments, rows, arguments = make((2, 12, 4, 4), torch.bfloat16, "l")
    expected = apply_group_norm(x, moments, 3, *rows, **arguments, backend=backend)
    apart = {name: t.float().mT.contiguous().mT for name, t in arguments.items()}
    strided = torch.stack(rows, 1).unbind(1)
    spread = moments.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(apply_group_norm(x, spread, 3, *strided, **apart, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples_and_no_positions(backend):
    x, moments, rows, arguments = make((3, 21))
    check(x, moments, 7, rows, arguments, backend)
    x, moments, rows, _ = make((2, 12, 4, 6), layout="l")
    assert apply_group_norm(x[:0], moments[:0], 3, *rows, resample="average", backend=backend).shape == (0, 12, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 200),
    spatial=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([*DTYPES.values()]),
    layout=st.sampled_from("cl"),
    parts=st.sets(st.sampled_from(PARTS)),
    activation=st.sampled_from([None, "silu"]),
    resample=st.sampled_from([None, "average"]),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_drawn(backend, n, c, spatial, dtype, layout, parts, activation, resample, seed, data):
    pair = data.draw(st.integers(0, c - 1))
    groups = data.draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    x, moments, rows, arguments = make((n, c, *spatial), dtype, layout, pair, sorted(parts), seed=seed)
    check(x, moments, groups, rows, arguments, backend, activation, resample)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["c", "l"])
def test_a_sample_does_not_depend_on_its_batch(layout, backend):
    x, moments, rows, arguments = make((3, 20, 12, 12), torch.float32, layout, 7)
    together = apply_group_norm(x, moments, 4, *rows, **arguments, activation="silu", backend=backend)
    for i in range(3):
        one = [tuple(t[i : i + 1] for t in pair) for pair in (x, moments)]
        films = {name: t[i : i + 1] for name, t in arguments.items()}
        alone = apply_group_norm(*one, 4, *rows, **films, activation="silu", backend=backend)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resample", [None, "average"])
@pytest.mark.parametrize("layout", ["c", "l"])
def test_opcheck(layout, resample, backend):
    x, moments, rows, a = make((2, 12, 4, 3), torch.float32, layout, 5)
    arguments = (*x, *moments, 3, *rows, 1e-5, a["add"], a["scale"], a["shift"], True, resample, backend)
    torch.library.opcheck(torch.ops.cmfast.apply_group_norm.default, arguments)


X, M, C = torch.ones(2, 6, 3, 3), torch.ones(2, 2, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_group_norm(C, M, 2, C, C), r"x must be .* got \[6\] float32"),
        (lambda: apply_group_norm(X.long(), M, 2, C, C), "x must be"),
        (lambda: apply_group_norm(X[:, :, :0], M, 2, C, C), "x must be"),
        (lambda: apply_group_norm((X, X[:1]), (M, M), 2, C, C), "must agree in everything but"),
        (lambda: apply_group_norm((X, X.half()), (M, M), 2, C, C), "must agree in everything but"),
        (lambda: apply_group_norm(X, (M, M), 2, C, C), "both a pair, got one tensor and a pair"),
        (lambda: apply_group_norm((X, X), M, 2, C, C), "both a pair, got a pair and one tensor"),
        (lambda: apply_group_norm(X, M.double(), 2, C, C), r"moments must be float32 \[2, 2, 6\], got .* float64"),
        (lambda: apply_group_norm((X, X[:, :2]), (M, M), 2, C, C), r"moments must be float32 \[2, 2, 2\]"),
        (lambda: apply_group_norm(X, M, 4, C, C), "num_groups must divide .* got 4 for 6"),
        (lambda: apply_group_norm(X, M, 2, C[:5], C), r"weight must be floating point \[6\]"),
        (lambda: apply_group_norm(X, M, 2, C, C.long()), "bias must be"),
        (lambda: apply_group_norm(X, M, 2, C, C, add=C), r"add must be floating point \[2, 6\]"),
        (lambda: apply_group_norm(X, M, 2, C, C, activation="relu"), "activation must be .* got 'relu'"),
        (lambda: apply_group_norm(X, M, 2, C, C, resample="nearest"), "resample must be .* got 'nearest'"),
        (lambda: apply_group_norm(X[:, :, :1], M, 2, C, C, resample="average"), "average pooling by 2 takes"),
        (lambda: apply_group_norm(X[:, :, 0, 0], M, 2, C, C, resample="average"), "average pooling by 2 takes"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_there_are_no_gradients():
    with pytest.raises(RuntimeError, match="serves inference"):
        apply_group_norm(X, M, 2, C.clone().requires_grad_(), C)
