"""Calls that go to a kernel without torch's dispatcher: the same results to the bit, and nothing that is not plain."""

import contextlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from cmfast.kernels import attention, backends, consistency_step, direct, group_norm, native, use_backend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(2, 64, 5, 7), (1, 32, 4, 4), (3, 32), (2, 64, 9), (1, 64, 2, 3, 4), (2, 64, 1, 1)]
CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def default(monkeypatch):
    """Nothing is chosen for the process, as the suite does."""
    for name in ("CMFAST_BACKEND", "CMFAST_GPU_ON_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert native.cpu().serves_by_default()


def normal(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype, memory_format=layout)


def rows(n, c):
    return {"weight": normal(c), "bias": normal(c), "add": normal(n, c), "scale": normal(n, c), "shift": normal(n, c)}


def arguments(h, skip=None, *, num_groups=32, eps=1e-5, activation="silu", **given):
    named = {name: given.get(name) for name in ("weight", "bias", "add", "scale", "shift")}
    return (h, skip, num_groups, named["weight"], named["bias"], eps, *list(named.values())[2:], activation)


def long_way(monkeypatch, call):
    with monkeypatch.context() as patched:
        patched.setattr(direct.plain, "is_plain", lambda tensors: False)
        return call()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["one", "pair", "channels last", "pair, channels last"])
def test_group_norm_is_the_same_to_the_bit(monkeypatch, shape, dtype, form):
    layout = CHANNELS_LAST if "channels last" in form and len(shape) == 4 else torch.contiguous_format
    h = normal(*shape, dtype=dtype, layout=layout)
    skip = normal(shape[0], 32, *shape[2:], dtype=dtype, layout=layout) if "pair" in form else None
    full = rows(shape[0], shape[1] + 32 * (skip is not None))
    narrow = {name: row.bfloat16() for name, row in full.items()}
    for given in (full, narrow, {"weight": normal(shape[1])}):
        if skip is not None and "bias" not in given:
            continue
        found = direct.group_norm(*arguments(h, skip, **given))
        assert found is not None
        pair = h if skip is None else (h, skip)
        expected = long_way(monkeypatch, lambda: group_norm(pair, 32, eps=1e-5, activation="silu", **given))  # noqa: B023
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        assert found.dtype == dtype


def test_the_operators_take_the_short_way(monkeypatch):
    """torch's dispatcher is not asked, nor a backend chosen."""

    def refuse(*arguments):
        raise AssertionError("the long way")

    monkeypatch.setattr(backends, "resolve", refuse)
    for module in ("group_norm", "attention", "consistency"):
        monkeypatch.setattr(f"cmfast.kernels.{module}.resolve", refuse, raising=False)
    x, heads = normal(2, 32, 3, 3), normal(1, 2, 5, 8)
    group_norm(x, 32)
    attention(heads, heads, heads)
    consistency_step(x, x, 0.5, torch.ones(2), clip=1.0, alpha=1.0, beta=0.5, seed=3)
    x.requires_grad_()
    with torch.no_grad():
        group_norm(x, 32)
    with torch.inference_mode():
        group_norm(normal(2, 32, 3, 3), 32)


def test_attention_and_the_step_are_the_same_to_the_bit(monkeypatch):
    q, k, v = normal(2, 5, 3, 4, 16).permute(2, 0, 3, 1, 4)
    x, out, vector = normal(2, 3, 4, 4), normal(2, 3, 4, 4, layout=CHANNELS_LAST), normal(2)
    step = {"clip": 1.0, "alpha": vector, "beta": 0.5, "seed": 7, "draw": 2, "first_sample": 5, "input_scale": 2.0}
    for call in (lambda: (attention(q, k, v, scale=0.3),), lambda: consistency_step(x, out, vector, 0.5, **step)):
        found, expected = call(), long_way(monkeypatch, call)
        for mine, other in zip(found, expected, strict=True):
            assert torch.equal(mine, other)
            assert mine.stride() == other.stride()


class Passing(TorchDispatchMode):
    """Lets every operator through."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def environment(name, value):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(name, value)
        yield


SITUATIONS = {
    "a dispatch mode": Passing,
    "a function mode": BaseTorchFunctionMode,
    "fake tensors": FakeTensorMode,
    "a profiler": torch.profiler.profile,
    "forward mode": forward_ad.dual_level,
    "a backend chosen": lambda: use_backend("reference"),
    "the automatic choice, asked for": lambda: use_backend("auto"),
    "a backend in the environment": lambda: environment("CMFAST_BACKEND", "reference"),
    "kernels of GPUs on the processor": lambda: environment("CMFAST_GPU_ON_CPU", "1"),
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_whoever_has_to_know_of_a_call_does(situation):
    x, heads = normal(2, 32, 3, 3), normal(1, 2, 5, 8)
    assert direct.group_norm(*arguments(x)) is not None
    with situation():
        assert direct.group_norm(*arguments(x)) is None
        assert direct.attention(heads, heads, heads, None) is None
        step = (0.5, 0.5, None, None, None, None, None, None, None, 0, 0)
        assert direct.consistency_step(x, x, *step) is None


def test_traced_and_mapped_calls_are_not_plain():
    seen = []

    def call(x):
        seen.append(direct.plain.is_plain((x,)))
        return x + 1

    x = normal(2, 32, 3, 3)
    torch.func.vmap(call)(x)
    torch.func.grad(lambda x: call(x).sum())(x)
    torch.func.functionalize(call)(x)
    make_fx(call)(x)
    torch.jit.trace(call, x, check_trace=False)
    assert seen == [False] * 5
    call(x)
    assert seen[-1]


class Subclass(torch.Tensor):
    """Another type of tensor."""


NOT_PLAIN = {
    "negated": lambda x: torch._neg_view(x),
    "a subclass": lambda x: x.as_subclass(Subclass),
    "requires a gradient": lambda x: x.clone().requires_grad_(),
    "float64": lambda x: x.double(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "of strides": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "of other dimensions": lambda x: x.permute(0, 1, 3, 2)[..., :2],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_other_tensors_take_the_long_way(make):
    assert direct.group_norm(*arguments(make(normal(2, 32, 4, 4)))) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"skip": normal(2, 32, 4, 4, layout=CHANNELS_LAST)},
        {"skip": normal(2, 32, 4, 4).half()},
        {"skip": normal(2, 32, 4)},
        {"skip": normal(2, 32, 4, 5)},
        {"skip": normal(1, 32, 4, 4)},
        {"weight": normal(31)},
        {"weight": normal(2, 32)},
        {"weight": normal(32).half()},
        {"weight": normal(64)[::2]},
        {"weight": torch._neg_view(normal(32))},
        {"scale": normal(32)},
        {"scale": normal(1, 32)},
        {"shift": normal(32, 2).T},
        {"num_groups": 5},
        {"num_groups": 0},
        {"num_groups": -32},
        {"activation": "gelu"},
    ],
    ids=lambda changes: " ".join(f"{k} {list(v.shape) if hasattr(v, 'shape') else v}" for k, v in changes.items()),
)
def test_what_the_kernel_does_not_take_as_it_is(changes):
    assert direct.group_norm(*arguments(normal(2, 32, 4, 4), **changes)) is None


HEADS = normal(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        (HEADS, HEADS.half(), HEADS),
        (HEADS, HEADS[..., :4], HEADS[..., :4]),
        (HEADS, HEADS[:, :1], HEADS[:, :1]),
        (HEADS, HEADS, HEADS[:, :, :3]),
        (HEADS[0], HEADS[0], HEADS[0]),
        (HEADS, HEADS[:, :, :0], HEADS[:, :, :0]),
        (HEADS[:, :, :0], HEADS, HEADS),
        (HEADS.double(), HEADS.double(), HEADS.double()),
        (HEADS, HEADS, torch._neg_view(HEADS)),
    ],
    ids=lambda t: str(list(t.shape)),
)
def test_attention_of_what_its_kernel_does_not_take(q, k, v):
    assert direct.attention(q, k, v, None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"model_output": normal(2, 3, 4, 4).double()},
        {"a": normal(2).half()},
        {"beta": normal(2).double()},
        {"a": normal(3)},
        {"a": normal(2).requires_grad_()},
        {"model_output": None},
        {"b": Fraction(1, 2)},
        {"b": 10**400},
        {"beta": None},
        {"noise": normal(2, 3, 4, 4)},
        {"seed": None},
        {"seed": -1},
        {"seed": 1 << 64},
        {"seed": 3.0},
        {"draw": -1},
        {"draw": 1 << 32},
        {"first_sample": (1 << 32) - 1},
        {"alpha": None, "beta": None, "seed": None, "input_scale": 2.0},
        {"noise": normal(2, 3, 4, 4).double(), "seed": None},
        {"noise": normal(2, 3, 4, 4).requires_grad_(), "seed": None},
        {"seed": torch.tensor(3)},
        {"first_sample": torch.tensor(0)},
        {"x": normal(0, 3, 4, 4)},
    ],
    ids=str,
)
def test_a_step_that_its_kernel_does_not_take(changes):
    given = {"x": normal(2, 3, 4, 4), "model_output": normal(2, 3, 4, 4), "a": 0.5, "b": 1, "alpha": 1.0, "beta": 0.5}
    given |= {"input_scale": None, "low": None, "high": None, "noise": None, "seed": 3, "draw": 0, "first_sample": 0}
    assert direct.consistency_step(**given) is not None
    assert direct.consistency_step(**given | changes) is None


def test_whatever_a_number_is_written_as():
    x = normal(2, 3, 4, 4)
    expected = consistency_step(x, x, 0.5, 2.0, clip=1.0, alpha=1.0, beta=0.25, seed=(1 << 64) - 1)
    for number in (np.float32, Fraction, lambda value: value):
        half, one, two, quarter = map(number, (0.5, 1, 2, 0.25))
        for clip in (one, (-one, one), [-one, one]):
            step = consistency_step(x, x, half, two, clip=clip, alpha=one, beta=quarter, seed=(1 << 64) - 1)
            assert torch.equal(step.denoised, expected.denoised)
            assert torch.equal(step.sample, expected.sample)


@torch.no_grad()
def test_the_short_way_checks_what_the_long_one_does():
    x, coefficient = normal(2, 3, 4, 4), normal(2).requires_grad_()
    with pytest.raises(ValueError, match="cannot require a gradient"):
        consistency_step(x, x, coefficient, 0.5)
    for wrong, message in (
        ({"clip": -1.0}, "clip must be"),
        ({"beta": 0.5}, "without the noise"),
        ({"seed": 3}, "without beta"),
        ({"beta": 0.5, "seed": 1 << 64}, "seed must be in"),
        ({"beta": 0.5, "seed": 3, "draw": -1}, "draw must be in"),
        ({"beta": 0.5, "seed": 3, "first_sample": (1 << 32) - 1}, "sample indices"),
        ({"input_scale": 2.0}, "scales the sample"),
        ({"alpha": normal(3)}, "a coefficient must be"),
    ):
        with pytest.raises(ValueError, match=message):
            consistency_step(x, x, 0.5, 0.5, **wrong)


def test_results_are_where_the_input_is():
    with torch.device("meta"):
        found = group_norm(_PLAIN, 32)
    assert found.device.type == "cpu"


_PLAIN = normal(2, 32, 3, 3)


def test_a_recorded_operator_is_what_its_call_is():
    x, w, q = normal(2, 32, 3, 3), normal(32), normal(1, 2, 5, 8)
    norm = (x, None, 32, w, None, 1e-5, None, None, None, True)
    with torch.no_grad():
        y, mean, rstd = direct.of_operator("group_norm", (*norm, None))
        assert torch.equal(y, group_norm(x, 32, w, activation="silu"))
        assert (mean.numel(), rstd.numel()) == (0, 0)
        assert torch.equal(direct.of_operator("attention", (q, q, q, 0.5, None))[0], attention(q, q, q, scale=0.5))
        assert direct.of_operator("attention", (q, q, q, 0.5, "cpu")) is None
    assert direct.of_operator("group_norm", (*norm, None)) is None


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("vectors", [False, True])
@torch.no_grad()
def test_a_recorded_step_is_what_its_call_is(seed, vectors):
    x, out = normal(3, 4, 5), normal(3, 4, 5)
    vectors = [torch.tensor([0.5, 0.25, 2.0])] + [None] * 4 if vectors else [None] * 5
    step = (x, out, vectors, [0.3, 0.5, 0.7, 0.9, 1.1], -1.0, 1.0, None, seed, 2, 1, seed is not None, seed is not None)
    found = direct.of_operator("consistency_step", (*step, None))
    expected = torch.ops.cmfast.consistency_step(*step, None)
    assert len(found) == len(expected) == (1 if seed is None else 3)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
    assert direct.of_operator("consistency_step", (*step, None, torch.tensor(3), None)) is None
