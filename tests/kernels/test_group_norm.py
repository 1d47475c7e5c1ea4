import itertools

import pytest
import torch
from cmfast.kernels import group_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from .backends import ON_GPU, served
from .memory import guarded, memory_strides
from .tolerance import assert_as_accurate, error

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PARTS = ("weight", "bias", "add", "scale", "shift")

# shape, groups: the released networks' channels at small sizes, odd ones, one position, one channel a group
SHAPES = {
    "N2-C192-8x8-G32": ((2, 192, 8, 8), 32),
    "N1-C576-5x7-G32": ((1, 576, 5, 7), 32),
    "N1-C1152-4x4-G32": ((1, 1152, 4, 4), 32),
    "N3-C10-3x5-G5": ((3, 10, 3, 5), 5),
    "N2-C7-13-G7": ((2, 7, 13), 7),
    "N2-C12-G3": ((2, 12), 3),
    "N1-C32-1x1-G1": ((1, 32, 1, 1), 1),
    "N2-C32-3x4x5-G32": ((2, 32, 3, 4, 5), 32),
    "N1-C6-67x3-G2": ((1, 6, 67, 3), 2),
}
# more than one program of a GPU holds: groups narrower and wider than a tile, sizes that tiles divide or not
LARGE_SHAPES = {
    "N1-C192-24x25-G32-pair": ((1, 192, 24, 25), 32, 97),
    "N1-C64-32x32-G2": ((1, 64, 32, 32), 2, 0),
    "N1-C12-67x67-G2-pair": ((1, 12, 67, 67), 2, 7),
    "N2-C33-1100-G3-pair": ((2, 33, 1100), 3, 11),
}
# What Triton's interpreter, which takes milliseconds a tile, gets in place of the large ones, under LOW_LIMITS: still
# groups narrower and wider than a tile and across its edges, several splits and passes over tiles, whole ones and not,
# and the first, positions innermost, for one kernel. There are fewer groups and positions of the same.
INTERPRETED_LARGE_SHAPES = {
    "N1-C18-24x25-G3-pair": ((1, 18, 24, 25), 3, 7),
    "N1-C32-32x32-G2": ((1, 32, 32, 32), 2, 0),
    "N1-C12-67x37-G2-pair": ((1, 12, 67, 37), 2, 7),
    "N2-C22-540-G2-pair": ((2, 22, 540), 2, 9),
}
# And for gradients, which two kernels always make: the released networks' channels a group, in fewer groups.
INTERPRETED_SHAPES = {
    "N2-C48-8x8-G8": ((2, 48, 8, 8), 8),
    "N1-C144-5x7-G8": ((1, 144, 5, 7), 8),
    "N1-C288-4x4-G8": ((1, 288, 4, 4), 8),
    **dict(list(SHAPES.items())[3:]),
}
LOW_LIMITS = {"PROGRAMS": 48, "LEAST_ELEMENTS": 256, "RESIDENT_ELEMENTS": 8192}
VARIANTS = {
    "plain": ((), None),
    "affine": (("weight", "bias"), None),
    "affine-silu": (("weight", "bias"), "silu"),
    "film-silu": (("weight", "bias", "scale", "shift"), "silu"),
    "add-silu": (("weight", "bias", "add"), "silu"),
    "everything": (PARTS, "silu"),
    "scale-only": (("scale",), None),
    "shift-only": (("shift",), None),
}


def each(op, cases, interpreted):
    """A parameter for each backend and case: those of `interpreted` for Triton's interpreter."""
    return [
        pytest.param(*case, *backend.values, marks=backend.marks, id=f"{name}-{backend.id or backend.values[0]}")
        for backend in served(op)
        for name, case in (interpreted if is_interpreted(*backend.values) else cases).items()
    ]


def is_interpreted(backend):
    return backend == "triton" and not ON_GPU


@pytest.fixture
def low_limits(backend, monkeypatch):
    """Divide what Triton's interpreter gets as if it were larger."""
    for name, value in LOW_LIMITS.items() if is_interpreted(backend) else ():
        monkeypatch.setattr(f"cmfast.kernels.triton.group_norm_grid.{name}", value)


def make(shape, dtype, parts, seed=0, layout="contiguous", pair=0):
    """x, or a pair split after so many channels, and the named arguments."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * 2 + 0.7).to(dtype)
    n, c = shape[:2]
    sizes = {"weight": (c,), "bias": (c,), "add": (n, c), "scale": (n, c), "shift": (n, c)}
    arguments = {name: guarded(torch.randn(sizes[name], generator=g).to(dtype)) for name in parts}
    if "scale" in arguments and "shift" in arguments:  # as a chunked projection gives them: strided rows
        both = guarded(torch.cat((arguments["scale"], arguments["shift"]), 1))
        arguments["scale"], arguments["shift"] = both.chunk(2, 1)
    tensors = [
        guarded(t, "l" if layout == "channels_last" else "c") for t in ((x[:, :pair], x[:, pair:]) if pair else (x,))
    ]
    return tuple(tensors) if pair else tensors[0], arguments


def wide(value):
    if isinstance(value, tuple):
        return tuple(v.double() for v in value)
    return {k: v.double() for k, v in value.items()} if isinstance(value, dict) else value.double()


def nearby(x, arguments):
    """Inputs a little different, on which the plain formula's rounding falls differently."""
    g = torch.Generator().manual_seed(0)

    def moved(t):
        # Little enough that what nearly cancels still does.
        amount = max(2.0**-12, 2 * torch.finfo(t.dtype).eps)
        return (t * (1 + amount * (torch.rand(t.shape, generator=g) - 0.5))).to(t.dtype)

    for _ in range(8):
        tensors = [moved(t) for t in tensors_of(x)]
        yield tuple(tensors) if isinstance(x, tuple) else tensors[0], {k: moved(v) for k, v in arguments.items()}


def tensors_of(x):
    return x if isinstance(x, tuple) else (x,)


def check(x, groups, arguments, activation, backend):
    def reference(x, arguments):
        return group_norm(x, groups, **arguments, activation=activation, backend="reference")

    exact, plain = reference(wide(x), wide(arguments)), reference(x, arguments)
    others = max((error(reference(*i), reference(*map(wide, i))) for i in nearby(x, arguments)), default=0.0)
    actual = group_norm(x, groups, **arguments, activation=activation, backend=backend)
    assert memory_strides(actual) == memory_strides(plain)
    assert actual.dtype == tensors_of(x)[0].dtype
    assert_as_accurate("y", actual, exact, plain, others)


def test_definition_is_torchs():
    x, a = make((2, 12, 5, 3), torch.float64, PARTS)
    h = F.group_norm(x + a["add"][..., None, None], 4, a["weight"], a["bias"], 1e-4)
    expected = F.silu(h * (1 + a["scale"][..., None, None]) + a["shift"][..., None, None])
    torch.testing.assert_close(group_norm(x, 4, eps=1e-4, **a, activation="silu", backend="reference"), expected)


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
def test_shapes(shape, groups, dtype, layout, backend):
    x, arguments = make(shape, dtype, PARTS, layout=layout)
    check(x, groups, arguments, "silu", backend)


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "pair", "backend"), each("group_norm", LARGE_SHAPES, INTERPRETED_LARGE_SHAPES)
)
def test_large_shapes(shape, groups, pair, dtype, layout, backend):
    if is_interpreted(backend) and dtype == torch.float16:
        pytest.skip("two dtypes are enough where launches are interpreted")
    x, arguments = make(shape, dtype, PARTS, layout=layout, pair=pair)
    check(x, groups, arguments, "silu", backend)


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 3:15],
        lambda t: t[:, ::2],
        lambda t: t[..., 1:],
        lambda t: t.transpose(2, 3),
        lambda t: t.expand(2, -1, -1, -1),
        lambda t: t.permute(0, 2, 1, 3),  # channels between the positions
    ],
    ids=["channels", "every-other-channel", "cropped", "transposed", "expanded", "interleaved"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_strides(activation, layout, view, backend):
    x, _ = make((1, 24, 6, 8), torch.float32, (), layout=layout)
    check(view(x), 3, {}, activation, backend)


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize("shape", [(0, 12, 3, 3), (2, 12, 0, 3)], ids=["N0", "no-positions"])
def test_empty(shape, backend):
    assert group_norm(torch.ones(shape), 4, backend=backend).shape == shape
    for eps in (1e-5, 0.0):
        rest = (None, 4, None, None, eps, None, None, None, False, backend)
        y, mean, rstd = torch.ops.cmfast.group_norm(torch.ones(shape), *rest)
        assert y.shape == shape
        assert torch.equal(mean, torch.zeros(shape[0], 4))
        torch.testing.assert_close(rstd, torch.full((shape[0], 4), eps).rsqrt())


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_that_overflow_are_not_taken_for_none(layout, backend):
    """Without a deviation, values would be divided by eps alone: they would be plausible ones."""
    x, _ = make((1, 8, 9, 8), torch.float32, (), layout=layout)
    y = group_norm(x * 1e20, 4, backend=backend)
    assert ((y == 0) | ~torch.isfinite(y)).all()  # what an infinite deviation makes of them


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize(
    ("shape", "backend"),
    each(
        "group_norm",
        {"small": ((2, 24, 5, 6),), "large": ((1, 64, 32, 32),)},
        {"small": ((2, 24, 5, 6),), "large": ((1, 32, 32, 32),)},
    ),
)
def test_bit_identical_from_run_to_run(shape, backend):
    x, arguments = make(shape, torch.float32, PARTS)
    first, second = (group_norm(x, 2, **arguments, activation="silu", backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("parts", "activation"), VARIANTS.values(), ids=VARIANTS)
def test_variants(parts, activation, layout, backend):
    x, arguments = make((2, 24, 5, 6), torch.float32, parts, layout=layout)
    check(x, 4, arguments, activation, backend)


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("split", [4, 8, 13])
def test_pair_is_the_concatenation(split, dtype, layout, backend):
    x, arguments = make((2, 24, 5, 3), dtype, PARTS, layout=layout, pair=split)
    check(x, 4, arguments, "silu", backend)


@pytest.mark.parametrize("backend", served("group_norm"))
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 6),
    per_group=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(list(DTYPES.values())),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    parts=st.sets(st.sampled_from(PARTS)),
    activation=st.sampled_from([None, "silu"]),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_drawn(backend, n, groups, per_group, spatial, dtype, layout, parts, activation, seed, data):
    channels = groups * per_group
    pair = data.draw(st.integers(0, channels - 1))
    x, arguments = make((n, channels, *spatial), dtype, sorted(parts), seed, layout, pair)
    check(x, groups, arguments, activation, backend)


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize(
    ("shape", "backend"),
    each(
        "group_norm",
        {"small": ((2, 8, 16, 16),), "large": ((1, 64, 24, 25),)},
        {"small": ((2, 8, 16, 16),), "large": ((1, 24, 24, 25),)},
    ),
)
def test_large_mean_is_not_lost(shape, layout, backend):
    x = guarded(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1000.0, layout)
    check(x, 2, {}, None, backend)


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize(
    ("shape", "backend"),
    each(
        "group_norm",
        {"small": ((1, 12, 4, 4),), "large": ((1, 12, 67, 67),)},
        {"small": ((1, 12, 4, 4),), "large": ((1, 12, 37, 37),)},
    ),
)
def test_constant_input_gives_the_bias(shape, backend):
    bias = torch.randn(12)
    y = group_norm(torch.full(shape, 3.0), 2, torch.ones(12), bias, backend=backend)
    torch.testing.assert_close(y, bias[None, :, None, None].expand(shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "groups", "backend"), each("group_norm_backward", SHAPES, INTERPRETED_SHAPES))
@pytest.mark.parametrize("pair", [False, True])
def test_gradients(pair, shape, groups, dtype, layout, backend):
    x, arguments = make(shape, dtype, PARTS, layout=layout, pair=shape[1] // 2 + 1 if pair else 0)
    check_gradients(x, groups, arguments, backend)


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "pair", "backend"), each("group_norm_backward", LARGE_SHAPES, INTERPRETED_LARGE_SHAPES)
)
def test_gradients_of_large_shapes(shape, groups, pair, layout, backend):
    x, arguments = make(shape, torch.float32, PARTS, layout=layout, pair=pair)
    check_gradients(x, groups, arguments, backend)


def check_gradients(x, groups, arguments, backend):
    pair = isinstance(x, tuple)
    h = tensors_of(x)[0]
    shape = (h.shape[0], sum(t.shape[1] for t in tensors_of(x)), *h.shape[2:])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)

    def gradients(x, arguments, grad, backend):
        leaves = [t.detach().requires_grad_() for t in (*tensors_of(x), *arguments.values())]
        first = tuple(leaves[:2]) if pair else leaves[0]
        named = dict(zip(arguments, leaves[2 if pair else 1 :], strict=True))
        y = group_norm(first, groups, **named, activation="silu", backend=backend)
        return torch.autograd.grad(y, leaves, grad)

    def references(x, arguments):
        exact = gradients(wide(x), wide(arguments), grad.double(), "reference")
        return zip(exact, gradients(x, arguments, grad, "reference"), strict=True)

    others = [[error(plain, exact) for exact, plain in references(*inputs)] for inputs in nearby(x, arguments)]
    actual = gradients(x, arguments, grad, backend)
    names = [*(("h", "skip") if pair else ("x",)), *arguments]
    for i, (name, a, (e, p)) in enumerate(zip(names, actual, references(x, arguments), strict=True)):
        assert_as_accurate(name, a, e, p, max((errors[i] for errors in others), default=0.0))


@pytest.mark.parametrize("pair", [False, True])
def test_gradcheck(pair):
    x, arguments = make((2, 6, 3, 2), torch.float64, PARTS, pair=2 if pair else 0)
    leaves = [t.detach().requires_grad_() for t in (*(x if pair else (x,)), *arguments.values())]

    def f(*leaves):
        first = tuple(leaves[:2]) if pair else leaves[0]
        named = dict(zip(arguments, leaves[2 if pair else 1 :], strict=True))
        return group_norm(first, 3, **named, activation="silu", backend="reference")

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("subset", list(itertools.combinations(range(6), 1)))
def test_gradients_of_each_input_alone(subset):
    x, arguments = make((2, 6, 4), torch.float64, PARTS)
    tensors = {"x": x, **arguments}
    wanted = [list(tensors)[i] for i in subset]
    leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in tensors.items()}
    y = group_norm(leaves.pop("x") if "x" not in wanted else (lead := leaves.pop("x")), 2, **leaves)
    y.sum().mul(2).backward()
    checked = lead if "x" in wanted else leaves[wanted[0]]
    assert checked.grad is not None
    assert checked.grad.shape == checked.shape


@pytest.mark.parametrize("backend", served("group_norm"))
@pytest.mark.parametrize(("pair", "layout"), [(0, "contiguous"), (5, "channels_last")])
def test_opcheck(pair, layout, backend):
    x, a = make((2, 12, 4, 3), torch.float32, PARTS, layout=layout, pair=pair)
    h, skip = x if pair else (x, None)
    args = (h, skip, 4, a["weight"], a["bias"], 1e-5, a["add"], a["scale"], a["shift"], True, backend)
    torch.library.opcheck(torch.ops.cmfast.group_norm.default, args)
    y, mean, rstd = torch.ops.cmfast.group_norm(*args)
    args = (y, h, skip, 4, a["weight"], a["bias"], a["add"], a["scale"], a["shift"], True, mean, rstd, backend)
    torch.library.opcheck(torch.ops.cmfast.group_norm_backward.default, args)


@pytest.mark.parametrize("pair", [0, 5])
def test_compiles_into_one_graph(pair):
    x, arguments = make((2, 12, 4, 3), torch.float32, PARTS, pair=pair)
    leaves = [t.detach().requires_grad_() for t in (*(x if pair else (x,)), *arguments.values())]

    def f(*leaves):
        first = tuple(leaves[:2]) if pair else leaves[0]
        named = dict(zip(arguments, leaves[2 if pair else 1 :], strict=True))
        return group_norm(first, 4, **named, activation="silu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), f(*leaves))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), f(*leaves))
    expected = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: group_norm(x, 5), "must divide"),
        (lambda x: group_norm(x, 0), "must divide"),
        (lambda x: group_norm(x.long(), 4), "floating-point tensor"),
        (lambda x: group_norm(x[0, 0, 0], 1), "floating-point tensor"),
        (lambda x: group_norm((x, x[:1]), 4), "must agree"),
        (lambda x: group_norm((x, x.half()), 4), "must agree"),
        (lambda x: group_norm(x, 4, torch.ones(3)), "weight must be"),
        (lambda x: group_norm(x, 4, scale=torch.ones(12)), "scale must be"),
        (lambda x: group_norm(x, 4, activation="relu"), "activation"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 12, 3, 3))
