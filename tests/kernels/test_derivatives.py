"""torch.func, forward mode and double backward through the operators, on every backend: see kernels/transforms.py.

Each operator has a twin in torch's own operators here; what torch makes of the twin in float64 is right.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from cmfast.kernels import (
    BackendError,
    apply_group_norm,
    attention,
    channel_moments,
    consistency_step,
    conv2d,
    fold_group_norm,
    group_norm,
    prepare_conv,
)
from cmfast.kernels.reference.philox import gaussian
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from .backends import ON_GPU, served
from .tolerance import assert_as_accurate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator as a function of tensors alone, and its twin."""

    op: str
    fused: Callable
    plain: Callable
    shapes: dict[str, tuple[int, ...]]
    #: Those of the tensors that are coefficients: float32 at least, and without a gradient.
    coefficients: tuple[str, ...] = ()
    channels_last: bool = False

    def make(self, dtype, seed=0) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        tensors = []
        for name, shape in self.shapes.items():
            t = torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype_of(name, dtype))
            if self.channels_last and len(shape) > 2:
                t = t.movedim(1, -1).contiguous().movedim(-1, 1)
            tensors.append(t)
        return tensors

    def dtype_of(self, name, dtype):
        return torch.float32 if name in self.coefficients and dtype != torch.float64 else dtype

    @property
    def leaves(self) -> int:
        """How many of the tensors, which come first, have gradients."""
        return len(self.shapes) - len(self.coefficients)


def plain_group_norm(groups, silu, x, skip=None, weight=None, bias=None, add=None, scale=None, shift=None):
    def channels(t):
        return t.reshape(*t.shape, *(1,) * (x.ndim - 2))

    u = x if skip is None else torch.cat((x, skip), 1)
    u = u if add is None else u + channels(add)
    y = F.group_norm(u.contiguous(), groups, weight, bias)
    y = y if scale is None else y * (1 + channels(scale))
    y = y if shift is None else y + channels(shift)
    return F.silu(y) if silu else y


def plain_attention(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, 3) @ v


def plain_step(x, model_output, noise, a, b, alpha, beta, input_scale):
    def samples(c):
        return c.reshape(-1, *(1,) * (x.ndim - 1)) if isinstance(c, Tensor) else c

    denoised = (samples(a) * x + samples(b) * model_output).clamp(-0.8, 0.8)
    sample = samples(alpha) * denoised + samples(beta) * noise
    return tuple(y.to(x.dtype) for y in (denoised, sample, samples(input_scale) * sample))


def step(x, model_output, noise, a, b, alpha, beta, input_scale, **k):
    z = {"seed": noise, "draw": 3, "first_sample": 5} if isinstance(noise, int) else {"noise": noise}
    return tuple(
        consistency_step(x, model_output, a, b, clip=0.8, alpha=alpha, beta=beta, input_scale=input_scale, **z, **k)
    )


def everything(h, skip, weight, bias, add, scale, shift, **k):
    return group_norm((h, skip), 4, weight, bias, add=add, scale=scale, shift=shift, activation="silu", **k)


SCALARS = (0.6, 0.5, 0.9, 0.4, 1.7)
CHANNELS = {"weight": (8,), "bias": (8,)}
ROWS = {"add": (2, 8), "scale": (2, 8), "shift": (2, 8)}
PAIR = {"h": (2, 5, 3, 2), "skip": (2, 3, 3, 2)}
COEFFICIENTS = {name: (2,) for name in ("a", "b", "alpha", "beta", "input_scale")}
SAMPLE = (2, 3, 3, 1)
CASES = {
    "group_norm": Case(
        "group_norm",
        lambda x, **k: group_norm(x, 3, **k),
        lambda x: plain_group_norm(3, False, x),
        {"x": (2, 6, 5)},
    ),
    "group_norm-everything": Case(
        "group_norm", everything, functools.partial(plain_group_norm, 4, True), PAIR | CHANNELS | ROWS
    ),
    "group_norm-channels_last": Case(
        "group_norm",
        lambda x, add, **k: group_norm(x, 2, add=add, activation="silu", **k),
        lambda x, add: plain_group_norm(2, True, x, add=add),
        {"x": (2, 8, 2, 3), "add": (2, 8)},
        channels_last=True,
    ),
    "attention": Case(
        "attention", attention, plain_attention, {"q": (2, 2, 3, 16), "k": (2, 2, 2, 16), "v": (2, 2, 2, 16)}
    ),
    "step": Case(
        "consistency_step",
        lambda x, f, z, **k: step(x, f, z, *SCALARS, **k),
        lambda x, f, z: plain_step(x, f, z, *SCALARS),
        {"x": SAMPLE, "model_output": SAMPLE, "noise": SAMPLE},
    ),
    "step-coefficients": Case(
        "consistency_step",
        step,
        plain_step,
        {"x": SAMPLE, "model_output": SAMPLE, "noise": SAMPLE} | COEFFICIENTS,
        coefficients=tuple(COEFFICIENTS),
    ),
    "step-seed": Case(
        "consistency_step",
        lambda x, f, **k: step(x, f, 2**63 + 7, *SCALARS, **k),
        lambda x, f: plain_step(x, f, gaussian(SAMPLE, 7 - 2**63, 3, 5, "cpu").to(x.dtype), *SCALARS),
        {"x": SAMPLE, "model_output": SAMPLE},
        channels_last=True,
    ),
}


def on_backends():
    """Every case on every backend that this machine can test."""
    return [
        pytest.param(case, *p.values, marks=p.marks, id=f"{name}-{p.id or p.values[0]}")
        for name, case in CASES.items()
        for p in served(case.op)
    ]


def scalar(f):
    """A function of one value that has no vanishing derivative."""

    def of(*tensors):
        return sum(
            (y * torch.arange(1, y.numel() + 1).to(y).reshape(y.shape).sin() + y**3).sum() for y in outputs(f(*tensors))
        )

    return of


def outputs(y):
    return (y,) if isinstance(y, Tensor) else y


def doubled(tensors):
    return [t.double() for t in tensors]


def assert_right(actual, exact, plain):
    """As accurate as the plain formula; its error on so few elements may be small by luck."""
    for name, (a, e, p) in enumerate(zip(*map(tree_leaves, (actual, exact, plain)), strict=True)):
        lucky = 4 * torch.finfo(p.dtype).eps * e.abs().max().item()
        assert_as_accurate(f"output {name}", a, e, p, lucky)


def assert_same(actual, expected, **tolerance):
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """The operators that kernels were asked for, in order."""
    asked = []
    for name in ("group_norm", "attention", "consistency"):
        module = sys.modules[f"cmfast.kernels.{name}"]

        def resolve(op, *arguments, resolve=module.resolve):
            asked.append(op)
            return resolve(op, *arguments)

        monkeypatch.setattr(module, "resolve", resolve)
    return asked


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("case", "backend"), on_backends())
def test_jvp_of_any_subset(case, backend, dtype, calls):
    tensors, tangents = case.make(dtype), case.make(dtype, seed=1)
    everywhere = range(len(tensors))

    def derivative(f, tensors, tangents, places):
        def of_some(*some):
            arguments = list(tensors)
            for place, value in zip(places, some, strict=True):
                arguments[place] = value
            return f(*arguments)

        return jvp(of_some, *(tuple(ts[place] for place in places) for ts in (tensors, tangents)))

    for places in (everywhere, *([place] for place in everywhere)):
        value, actual = derivative(functools.partial(case.fused, backend=backend), tensors, tangents, places)
        assert_right(
            (value, actual),
            derivative(case.plain, doubled(tensors), doubled(tangents), places),
            derivative(case.plain, tensors, tangents, places),
        )
    assert calls == []
    assert_same(value, case.fused(*tensors, backend="reference"), rtol=0, atol=0)


@pytest.mark.parametrize(("case", "backend"), on_backends())
def test_dual_level(case, backend):
    tensors, tangents = case.make(torch.float32), case.make(torch.float32, seed=1)
    f = functools.partial(case.fused, backend=backend)
    with forward_ad.dual_level(), torch.no_grad():
        # The first has no tangent.
        duals = (
            [tensors[0], *map(forward_ad.make_dual, tensors[1:], tangents[1:])]
            if len(tensors) > 1
            else [forward_ad.make_dual(tensors[0], tangents[0])]
        )
        y = outputs(f(*duals))
        actual = [forward_ad.unpack_dual(t).tangent for t in y]
    at = 1 if len(tensors) > 1 else 0
    expected = jvp(lambda *some: f(*tensors[:at], *some), tuple(tensors[at:]), tuple(tangents[at:]))[1]
    assert_same(actual, outputs(expected))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numerical_derivatives_of_the_definition(case):
    tensors = case.make(torch.float64)
    leaves = [t.requires_grad_() for t in tensors[: case.leaves]]

    def f(*leaves):
        return case.fused(*leaves, *tensors[case.leaves :], backend="reference")

    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=True, **batched)
    assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(("case", "backend"), on_backends())
def test_hessian_vector_products(case, backend):
    def product(f, tensors, vectors):
        leaves = [t.detach().requires_grad_() for t in tensors[: case.leaves]]
        first = torch.autograd.grad(scalar(f)(*leaves, *tensors[case.leaves :]), leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, vectors[: case.leaves])

    tensors, vectors = case.make(torch.float32), case.make(torch.float32, seed=1)
    assert_right(
        product(functools.partial(case.fused, backend=backend), tensors, vectors),
        product(case.plain, doubled(tensors), doubled(vectors)),
        product(case.plain, tensors, vectors),
    )


@pytest.mark.parametrize(("case", "backend"), on_backends())
def test_the_first_backward_is_the_kernels(case, backend, calls):
    tensors = case.make(torch.float32)
    leaves = [t.requires_grad_() for t in tensors[: case.leaves]]
    f = scalar(functools.partial(case.fused, backend=backend))
    numbers = tuple(range(case.leaves))

    expected = torch.autograd.grad(f(*tensors), leaves)
    assert calls == [case.op, f"{case.op}_backward"]
    calls.clear()
    assert_same(torch.autograd.grad(f(*tensors), leaves, create_graph=True), expected, rtol=0, atol=0)
    assert calls == [case.op, f"{case.op}_backward"]
    calls.clear()
    assert_same(grad(f, numbers)(*(t.detach() for t in tensors)), expected, rtol=0, atol=0)
    assert calls == [case.op, f"{case.op}_backward"]


def batched(case, dtype, size=3):
    """`size` drawings of the case's tensors."""
    return [torch.stack(ts) for ts in zip(*(case.make(dtype, seed) for seed in range(size)), strict=True)]


def loop(f, dims, tensors, size=3):
    results = [
        f(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True))) for i in range(size)
    ]
    return tree_map(lambda *ys: torch.stack(ys), *results)


@pytest.mark.parametrize(("case", "backend"), on_backends())
def test_vmap_over_any_argument(case, backend, calls):
    stacked = batched(case, torch.float32)
    f = functools.partial(case.fused, backend=backend)
    places = range(len(stacked))
    first = ((0,) * len(stacked), stacked)
    last = ((-1,) * len(stacked), [t.movedim(0, -1) for t in stacked])
    one = [
        ([0 if i == place else None for i in places], [t if i == place else t[0] for i, t in enumerate(stacked)])
        for place in places
    ]
    for dims, tensors in (first, last, *one):
        calls.clear()
        actual = vmap(f, tuple(dims))(*tensors)
        own_affine = any(
            dim is not None for name, dim in zip(case.shapes, dims, strict=True) if name in ("weight", "bias")
        )
        assert calls == ([] if own_affine else [case.op])
        assert_same(actual, loop(f, dims, tensors), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("case", "backend"), on_backends())
def test_per_sample_gradients(case, backend, calls):
    stacked = batched(case, torch.float32)
    f = scalar(functools.partial(case.fused, backend=backend))
    numbers = tuple(range(case.leaves))
    shared = tuple(None if name in ("weight", "bias") else 0 for name in case.shapes)
    tensors = [t[0] if dim is None else t for t, dim in zip(stacked, shared, strict=True)]
    actual = vmap(grad(f, numbers), shared)(*tensors)
    assert calls == [case.op, f"{case.op}_backward"]
    assert_same(actual, loop(grad(f, numbers), shared, tensors), rtol=1e-4, atol=1e-4)
    if None in shared:  # networks of their own: the definition
        every = (0,) * len(stacked)
        assert_same(vmap(grad(f, numbers))(*stacked), loop(grad(f, numbers), every, stacked), rtol=1e-4, atol=1e-4)


def squares(f):
    return lambda *tensors: sum(y.square().sum() for y in outputs(f(*tensors)))


def tangents_of(tensors):
    return tuple((3 * t).sin() for t in tensors)


def differentiated_outside(f):
    """The pullback differentiated by the gradient that is given to it, outside of the transformation that made it."""

    def of(*tensors):
        y, pull = vjp(f, *tensors)
        cotangents = tree_map(lambda t: t.detach().cos().requires_grad_(), y)
        return torch.autograd.grad(squares(lambda: pull(cotangents))(), tree_leaves(cotangents))

    return of


def grads_batched(f):
    def of(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        ys = tree_leaves(f(*leaves))
        batches = [torch.stack((y, 2 * y.sin())).detach() for y in ys]
        return torch.autograd.grad(ys, leaves, batches, is_grads_batched=True)

    return of


def autograd_over_vmap(f):
    """Both backward passes outside of the transformation."""

    def of(*tensors):
        leaves = [torch.stack((t, t.cos()), -1).detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(scalar(vmap(f, -1))(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(squares(lambda: first)(), leaves)

    return of


def over_batch(transform):
    """`transform` of the mapped function, at a batch of two."""

    def of(f):
        return lambda *tensors: transform(f)(*(torch.stack((t, t.cos())) for t in tensors))

    return of


def first_of_batch(f):
    """Mapped over its first argument alone."""
    return lambda x, *others: vmap(f, (0, *(None,) * len(others)))(x, *others)


def crossed(f):
    """Mapped over its first argument, and for each of that over the others."""

    def of(x, *others):
        inner = vmap(f, (None, *(0,) * len(others))) if others else f
        return vmap(inner, (0, *(None,) * len(others)))(x, *others)

    return of


def everywhere(transform):
    """`transform` of f for each of its arguments."""
    return lambda f: lambda *tensors: transform(f, tuple(range(len(tensors))))(*tensors)


def gradients(f):
    return everywhere(grad)(scalar(f))


TRANSFORMS = {
    "grad": gradients,
    "grad of grad": lambda f: everywhere(grad)(squares(gradients(f))),
    "grad of grad of grad": lambda f: everywhere(grad)(squares(everywhere(grad)(squares(gradients(f))))),
    "hessian": lambda f: everywhere(hessian)(scalar(f)),
    "jacrev of jacrev": lambda f: everywhere(jacrev)(everywhere(jacrev)(scalar(f))),
    "jacrev": everywhere(jacrev),
    "jacfwd": everywhere(jacfwd),
    "grad of jvp": lambda f: gradients(lambda *ts: jvp(f, ts, tangents_of(ts))[1]),
    "jvp of grad": lambda f: lambda *ts: jvp(gradients(f), ts, tangents_of(ts)),
    "jvp of jvp": lambda f: lambda *ts: jvp(lambda *us: jvp(f, us, tangents_of(us))[1], ts, tangents_of(ts)),
    "linearize": lambda f: lambda *ts: linearize(f, *ts)[1](*tangents_of(ts)),
    "functionalize": lambda f: functionalize(gradients(f)),
    "vmap": over_batch(vmap),
    "vmap of grad": over_batch(lambda f: vmap(gradients(f))),
    "vmap of grad of grad": over_batch(lambda f: vmap(everywhere(grad)(squares(gradients(f))))),
    "vmap of jvp": over_batch(lambda f: vmap(lambda *ts: jvp(f, ts, tangents_of(ts)))),
    "jvp of vmap": over_batch(lambda f: lambda *ts: jvp(vmap(f), ts, tangents_of(ts))),
    "grad of vmap": over_batch(lambda f: gradients(vmap(f))),
    "grad of grad of vmap": over_batch(lambda f: everywhere(grad)(squares(gradients(vmap(f))))),
    "grad of vmap of one": lambda f: lambda x, *ts: gradients(first_of_batch(f))(torch.stack((x, x.cos())), *ts),
    "vmap of vmap of grad": over_batch(lambda f: crossed(gradients(f))),
    "autograd over vmap": autograd_over_vmap,
    "is_grads_batched": grads_batched,
    "pullback differentiated outside": differentiated_outside,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transforms_compose(case, transform):
    tensors = case.make(torch.float64)
    leaves, constants = tensors[: case.leaves], tensors[case.leaves :]
    actual = transform(lambda *ts: case.fused(*ts, *constants, backend="reference"))(*leaves)
    expected = transform(lambda *ts: case.plain(*ts, *constants))(*leaves)
    assert any(y.any() for y in tree_leaves(expected))
    assert_same(actual, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("transform", [TRANSFORMS["grad of jvp"], gradients, vmap], ids=["grad of jvp", "grad", "vmap"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transforms_compile_into_one_graph(case, transform):
    tensors = case.make(torch.float64)
    leaves, constants = tensors[: case.leaves], tensors[case.leaves :]
    if case is CASES["group_norm"] and transform is TRANSFORMS["grad of jvp"]:
        pytest.xfail("torch 2.13 cannot compile it for F.group_norm(x, 3) * 2 either")
    if transform is vmap:
        leaves = [torch.stack((t, t.cos())) for t in leaves]
    torch._dynamo.reset()
    compiled = torch.compile(transform(lambda *ts: case.fused(*ts, *constants)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*leaves), transform(lambda *ts: case.plain(*ts, *constants))(*leaves))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_tangent_through_the_backward(case):
    """A backward that was recorded outside meets a tangent inside: by the definition as well."""
    tensors = case.make(torch.float64)
    leaves = [t.requires_grad_() for t in tensors[: case.leaves]]
    ys = tree_leaves(case.fused(*tensors, backend="reference"))
    cotangents = tuple(y.detach().cos() for y in ys)

    def pull(*cotangents):
        return torch.autograd.grad(ys, leaves, cotangents, retain_graph=True)

    # The pullback is linear.
    assert_same(jvp(pull, cotangents, tuple(y.detach() for y in ys))[1], pull(*(y.detach() for y in ys)))


@pytest.mark.skipif(ON_GPU, reason="conftest.py lets the backends take copies of any tensors")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_backend_that_is_asked_for_serves_or_raises(case):
    tensors = case.make(torch.float64)
    stacked = [torch.stack((t, t)) for t in tensors]
    for transformed in (
        lambda f: jvp(f, tuple(tensors), tuple(tensors)),
        lambda f: vmap(f)(*stacked),
        lambda f: grad(scalar(f))(*tensors),
        lambda f: jvp(vmap(f), tuple(stacked), tuple(stacked)),
    ):
        with pytest.raises(BackendError, match=f"'cpu' cannot serve {case.op}: float64 is served by the reference"):
            transformed(functools.partial(case.fused, backend="cpu"))
        with pytest.raises(BackendError, match="unknown backend 'gpu'"):
            transformed(functools.partial(case.fused, backend="gpu"))


def test_coefficients_have_no_gradient_under_any_transformation():
    tensors = CASES["step-coefficients"].make(torch.float32)
    place = list(CASES["step-coefficients"].shapes).index("beta")

    def of_beta(beta):
        return step(*tensors[:place], beta, *tensors[place + 1 :])[1].sum()

    betas = torch.stack((tensors[place],) * 2)
    for differentiated in (
        lambda: grad(of_beta)(tensors[place]),
        lambda: vmap(grad(of_beta))(betas),
        lambda: grad(lambda b: vmap(of_beta)(b).sum())(betas),  # a mapped tensor does not show that it requires one
        lambda: vmap(of_beta)(betas.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match="cannot require a gradient"):
            differentiated()


def test_operators_for_inference_refuse_what_they_cannot_derive():
    x = torch.randn(2, 4, 4, 4)
    prepared = prepare_conv(torch.randn(4, 4, 3, 3), height=4, width=4)
    ones = torch.ones(4)
    for f, t in (
        (lambda x: conv2d(x, prepared, backend="reference").out, x),
        (lambda x: channel_moments(x, backend="reference"), x),
        (lambda m: fold_group_norm(m, 16, 2, ones, ones, backend="reference")[0], channel_moments(x)),
        (lambda m: apply_group_norm(x, m, 2, ones, ones, backend="reference"), channel_moments(x)),
    ):
        stacked = torch.stack((t, t))
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            jvp(f, (t,), (t,))
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"), forward_ad.dual_level():
            f(forward_ad.make_dual(t, t))
        with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
            grad(lambda t, f=f: f(t).sum())(t)
        with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
            grad(lambda t, f=f: vmap(f)(t).sum())(stacked)
        with torch.no_grad():
            torch.testing.assert_close(vmap(f)(stacked), torch.stack((f(t), f(t))))


def test_empty_batches():
    x = torch.randn(0, 2, 8, 3)
    assert vmap(lambda x: group_norm(x, 4))(x).shape == x.shape
    x = torch.randn(3, 0, 8, 3)
    assert vmap(lambda x: group_norm(x, 4))(x).shape == x.shape
    assert vmap(lambda x: consistency_step(x, x, 1.0, 0.5).denoised)(x).shape == x.shape


def test_a_call_without_a_derivative_is_the_operator_alone():
    """No torch.autograd.Function on the way: its cost on the host is that of several launches."""
    with mock.patch.object(torch.autograd.Function, "apply", side_effect=AssertionError):
        for case in CASES.values():
            tensors = case.make(torch.float32)
            case.fused(*tensors)
            with torch.no_grad():
                case.fused(*(t.requires_grad_() for t in tensors[: case.leaves]), *tensors[case.leaves :])
