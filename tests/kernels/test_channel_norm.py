import pytest
import torch
from cmfast.kernels import channel_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from .backends import served
from .memory import guarded

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# N, C, *spatial: whole registers, and one more or less
SHAPES = {
    "tokens": (70, 64),
    "odd": (3, 67, 9, 5),
    "few-channels": (2, 3, 11, 8),
    "one-channel": (2, 1, 5, 7),
    "one-position": (2, 20, 1, 1),
    "audio": (2, 35, 57),
    "video": (1, 18, 3, 5, 7),
    "two-threads": (2, 33, 17, 31),
    "many-channels": (2, 8200, 1),
}
FORMS = {
    "layer": {},
    "rms": {"centred": False},
    "normalize": {"centred": False, "eps": 0.0, "least": 1e-4},
}
PARTS = ("weight", "bias", "scale", "shift")


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make(shape, dtype, layout="l", parts=PARTS, mean=1.0, seed=0):
    """x with another mean and spread at each position, and the rows apart in memory, as one linear layer makes them."""
    n, c = shape[:2]
    spread = 1 + draw(n, 1, *shape[2:], seed=seed + 1).abs()
    x = draw(*shape, seed=seed) * spread + mean
    wide = torch.full((n, 2 * c + 3), torch.nan)
    rows = {"weight": draw(c, seed=seed + 2), "bias": draw(c, seed=seed + 3)}
    for i, name in enumerate(("scale", "shift")):
        rows[name] = wide[:, i * c : (i + 1) * c]
        rows[name].copy_(draw(n, c, seed=seed + 4 + i))
    return guarded(x.to(dtype), layout), {name: rows[name] for name in parts}


def exact(x, arguments, **form):
    wide = {name: t.double() for name, t in arguments.items()}
    return channel_norm(x.double(), **wide, **form, backend="reference")


def check(x, arguments, backend, **form):
    y = channel_norm(x, **arguments, **form, backend=backend)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert x.stride() == y.stride() or not x.is_contiguous() or y.is_contiguous()
    expected = exact(x, arguments, **form)
    plain = channel_norm(x, **arguments, **form, backend="reference")
    allowed = 2 * (plain.double() - expected).abs().max() + torch.finfo(x.dtype).eps * expected.abs() + 1e-6
    assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("backend", served("channel_norm"))
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_its_definition(shape, layout, backend):
    for dtype in DTYPES.values():
        x, arguments = make(shape, dtype, layout)
        check(x, arguments, backend, activation="silu")


@pytest.mark.parametrize("backend", served("channel_norm"))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form(form, backend):
    for shape in SHAPES.values():
        x, arguments = make(shape, torch.float32)
        check(x, arguments, backend, **form)


@pytest.mark.parametrize("backend", served("channel_norm"))
@pytest.mark.parametrize("parts", [(), ("weight",), ("bias",), ("scale",), ("shift",), ("weight", "shift")], ids=str)
def test_any_part_may_be_missing(parts, backend):
    x, arguments = make((2, 37, 5, 6), torch.float32, parts=parts)
    check(x, arguments, backend)


@pytest.mark.parametrize("backend", served("channel_norm"))
def test_it_is_torchs(backend):
    x, a = make((3, 40, 6), torch.float32, parts=("weight", "bias"))
    found = channel_norm(x, a["weight"], a["bias"], 1e-3, backend=backend)
    expected = F.layer_norm(x.mT.double(), [40], a["weight"].double(), a["bias"].double(), 1e-3).mT
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found = channel_norm(x, a["weight"], None, 1e-3, centred=False, backend=backend)
    expected = F.rms_norm(x.mT.double(), [40], a["weight"].double(), 1e-3).mT
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found = channel_norm(x, None, None, 0.0, centred=False, least=0.5**2 / 40, backend=backend)
    expected = F.normalize(x.double(), dim=1, eps=0.5) * 40**0.5
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", served("channel_norm"))
def test_small_values_are_not_divided_by_less_than_the_least(backend):
    x = torch.full((1, 4, 2), 1e-20)
    y = channel_norm(x, eps=0.0, centred=False, least=1e-8, backend=backend)
    torch.testing.assert_close(y, x * 1e4, rtol=1e-6, atol=0)
    assert channel_norm(torch.zeros(1, 4, 2), eps=1e-5, backend=backend).abs().max() == 0


@pytest.mark.parametrize("backend", served("channel_norm"))
def test_a_large_mean_does_not_matter(backend):
    x, arguments = make((2, 67, 4, 5), torch.float32, parts=(), mean=1000.0)
    check(x, arguments, backend)


@pytest.mark.parametrize("backend", served("channel_norm"))
def test_views(backend):
    x = draw(4, 30, 12, 10).to(memory_format=torch.channels_last)
    for view in (x[:, :7], x[:, 5:21], x[:, :, 2:9], x[::2], x[:, ::2], x.transpose(2, 3), x[:, :, 0], x[:0]):
        check_view(view, backend)
    check_view(x[:, :, :1].expand(4, 30, 12, 10), backend)
    check_view(draw(5, 90)[:, 7:40], backend)


def check_view(view, backend):
    y = channel_norm(view, backend=backend)
    torch.testing.assert_close(y.double(), exact(view, {}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", served("channel_norm"))
@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 150),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    parts=st.sets(st.sampled_from(PARTS)),
    form=st.sampled_from(list(FORMS)),
    seed=st.integers(0, 100),
)
def test_drawn(backend, n, c, spatial, parts, form, seed):
    x, arguments = make((n, c, *spatial), torch.float32, "l", parts, seed=seed)
    check(x, arguments, backend, **FORMS[form])


@pytest.mark.parametrize("backend", served("channel_norm"))
def test_opcheck(backend):
    for layout in ("c", "l"):
        x, a = make((2, 6, 5, 4), torch.float32, layout)
        arguments = (x, a["weight"], a["bias"], 1e-5, True, 0.0, a["scale"], a["shift"], True, backend)
        torch.library.opcheck(torch.ops.cmfast.channel_norm.default, arguments)


X, C = torch.ones(2, 6, 3), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: channel_norm(C), r"x must be .* got \[6\] float32"),
        (lambda: channel_norm(X.long()), "x must be"),
        (lambda: channel_norm(X[:, :0]), "x must be"),
        (lambda: channel_norm(X, C[:5]), r"weight must be floating point \[6\], got \[5\]"),
        (lambda: channel_norm(X, C, C.long()), "bias must be"),
        (lambda: channel_norm(X, scale=C), r"scale must be floating point \[2, 6\]"),
        (lambda: channel_norm(X, shift=X), "shift must be"),
        (lambda: channel_norm(X, activation="gelu"), "activation must be None or \"silu\", got 'gelu'"),
        (lambda: channel_norm(X, eps=-1.0), "must not be negative"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_there_are_no_gradients():
    with pytest.raises(RuntimeError, match="serves inference"):
        channel_norm(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(channel_norm, (X,), (X,))
    with pytest.raises(RuntimeError, match="serves inference"):
        torch.func.grad(lambda x: torch.func.vmap(channel_norm)(x).sum())(X[None])
