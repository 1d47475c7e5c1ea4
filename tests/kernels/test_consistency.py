import contextlib
import importlib
import math
import re
from unittest import mock

import pytest
import torch
from cmfast.kernels import consistency_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .backends import served
from .memory import GUARD, guarded, memory_strides
from .plain import plain_noise
from .tolerance import assert_as_accurate

# dtypes of x and of model_output
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32-bf16": (torch.float32, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
}
SHAPES = {
    "N2-C3-8x8": (2, 3, 8, 8),
    "N3-C1-6x6": (3, 1, 6, 6),
    "N1-C4-5x7": (1, 4, 5, 7),
    "N2-C3-1x1": (2, 3, 1, 1),
    "N2-C5": (2, 5),
    "N2-C2-37": (2, 2, 37),
    "N1-C3-2x4x6": (1, 3, 2, 4, 6),
    "N1-C3-20x20": (1, 3, 20, 20),
}
LAYOUTS = {"nchw": "cc", "nhwc": "ll", "nhwc-nchw": "lc", "nchw-nhwc": "cl"}
# coefficients: floats, or vectors [N] where True
FORMS = {
    "denoised": {},
    "clip": {"clip": 0.8},
    "clip-range": {"clip": (-0.2, 1.5), "vectors": "ab"},
    "alpha-only": {"alpha": 0.6, "input_scale": 1.7},
    "noise": {"beta": 0.3, "noise": True, "clip": 0.5},
    "noise-vectors": {"alpha": 0.9, "beta": 0.3, "noise": True, "input_scale": 1.7, "vectors": ("alpha", "beta")},
    "seed": {"alpha": 0.9, "beta": 0.3, "seed": 7, "clip": 1.0},
    "seed-vectors": {
        "alpha": 0.9,
        "beta": 0.3,
        "seed": (0xFEDCBA98 << 32) + 0x87654321,
        "draw": 2**32 - 1,
        "first_sample": 2**31 - 1,
        "input_scale": 1.7,
        "vectors": ("a", "b", "alpha", "beta", "input_scale"),
    },
}


def make(shape, dtypes, form, seed=0, layouts="cc"):
    """x, model_output and the keyword arguments of a form, with its vectors drawn."""
    g = torch.Generator().manual_seed(seed)
    x, model_output = (
        guarded(torch.randn(shape, generator=g).to(dtype), layout)
        for dtype, layout in zip(dtypes, layouts, strict=True)
    )
    arguments = {"a": 0.5, "b": -0.7, **form}
    for name in arguments.pop("vectors", ()):
        arguments[name] = guarded(torch.rand(shape[0], 1, generator=g) + 0.5, "c")[:, 0]
    if arguments.get("noise"):
        arguments["noise"] = guarded(torch.randn(shape, generator=g).to(dtypes[0]), layouts[0])
    return x, model_output, arguments


def wide(value):
    if isinstance(value, dict):
        return {k: wide(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) else value


def plain(x, model_output, arguments):
    """The reference at the precision of its inputs, with noise made in float32 as well."""
    arguments = dict(arguments)
    if "seed" in arguments:
        key = [arguments.pop(name, 0) for name in ("seed", "draw", "first_sample")]
        arguments["noise"] = plain_noise(x.shape, *key)
    return consistency_step(x, model_output, **arguments, backend="reference")


def check(x, model_output, arguments, backend):
    exact = consistency_step(wide(x), wide(model_output), **wide(arguments), backend="reference")
    expected = plain(x, model_output, arguments)
    actual = consistency_step(x, model_output, **arguments, backend=backend)
    for name, a, e, p in zip(actual._fields, actual, exact, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert memory_strides(a) == memory_strides(p), name
            assert_as_accurate(name, a, e, p)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_definition(form):
    x, f, k = make((3, 4, 5, 2), (torch.float64, torch.float64), form)
    k = {name: v[:, None, None, None] if isinstance(v, Tensor) and v.ndim == 1 else v for name, v in k.items()}
    denoised = k["a"] * x + k["b"] * f
    if "clip" in k:
        low, high = k["clip"] if isinstance(k["clip"], tuple) else (-k["clip"], k["clip"])
        denoised = denoised.clip(low, high)
    sample = k.get("alpha", 1.0) * denoised
    if "seed" in k:
        k["noise"] = plain_noise(x.shape, k["seed"], k.get("draw", 0), k.get("first_sample", 0))
    if "noise" in k:
        sample = sample + k["beta"] * k["noise"]
    actual = consistency_step(*make((3, 4, 5, 2), (torch.float64, torch.float64), form)[:2], **wide_form(form))
    torch.testing.assert_close(actual.denoised, denoised)
    if "alpha" in k or "beta" in k:
        torch.testing.assert_close(actual.sample, sample, rtol=0, atol=2e-6 if "seed" in k else 1e-12)
    if "input_scale" in k:
        torch.testing.assert_close(actual.model_input, k["input_scale"] * actual.sample)


def wide_form(form):
    return make((3, 4, 5, 2), (torch.float64, torch.float64), form)[2] | {"backend": "reference"}


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("layouts", ["cc", "ll", "lc"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtypes, layouts, backend):
    x, model_output, arguments = make(shape, dtypes, FORMS["seed-vectors"], layouts=layouts)
    check(x, model_output, arguments, backend)


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form, layouts, backend):
    x, model_output, arguments = make((2, 3, 6, 4), DTYPES["fp32"], form, layouts=layouts)
    check(x, model_output, arguments, backend)


STRIDED = {
    "cropped": lambda big: big[:, :3, 1:7, 2:6],
    "every-second": lambda big: big[:, :3, ::2, ::2],
    "transposed": lambda big: big[:, :3, :6, :4].transpose(2, 3),
    "batch-innermost": lambda big: big[:, :3, :6, :4].movedim(0, -1).contiguous().movedim(-1, 0),
    "one-sample-expanded": lambda big: big[:1, :3].expand(big.shape[0], -1, -1, -1),
    "constant": lambda big: big[:1, :1, :1, :1].expand(2, 3, 6, 4),
    "some-channels-last": lambda big: big.movedim(1, -1).contiguous().movedim(-1, 1)[:, 1:4],
    "six-dimensions": lambda big: big.reshape(2, 4, 2, 4, 2, 4).permute(0, 4, 1, 5, 2, 3),
}


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("form", ["clip", "noise-vectors", "seed"])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strides(view, form, backend):
    g = torch.Generator().manual_seed(0)
    x = view(torch.randn(2, 4, 8, 8, generator=g))
    _, model_output, arguments = make(tuple(x.shape), DTYPES["fp32"], FORMS[form])
    check(x, model_output, arguments, backend)
    check(model_output, x, arguments, backend)


@pytest.mark.parametrize("backend", served("consistency_step"))
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    dtypes=st.sampled_from(list(DTYPES.values())),
    layouts=st.sampled_from(list(LAYOUTS.values())),
    form=st.sampled_from(list(FORMS)),
    seed=st.integers(0, 100),
)
def test_drawn(backend, n, channels, spatial, dtypes, layouts, form, seed):
    x, model_output, arguments = make((n, channels, *spatial), dtypes, FORMS[form], seed, layouts)
    check(x, model_output, arguments, backend)


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_more_than_one_tile_a_sample(backend):
    for layouts in ("cc", "ll"):
        x, model_output, arguments = make((2, 3, 12, 33), DTYPES["bf16"], FORMS["seed"], layouts=layouts)
        check(x, model_output, arguments, backend)


@contextlib.contextmanager
def guarded_outputs(backend, layout):
    """Give the backend's outputs guards in memory; the list of the outputs, whose guards must be whole at the end."""
    module = importlib.import_module(f"cmfast.kernels.{backend}.consistency")
    outputs = []

    def empty_inside(like, shape, dtype=None):
        zeros = torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)
        outputs.append(guarded(zeros, layout, guard=3.0))
        return outputs[-1]

    def like_another(like, dtype=None):
        return empty_inside(like, like.shape, dtype)

    with (
        mock.patch.object(module, "empty_in_order", empty_inside),
        mock.patch.object(torch, "empty_like", like_another),
    ):
        yield outputs
    for output in outputs:
        memory = output.as_strided((output.numel() + 2 * GUARD,), (1,), 0)
        assert (memory[:GUARD] == 3.0).all()
        assert (memory[-GUARD:] == 3.0).all()


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("layouts", ["cc", "ll"])
@pytest.mark.parametrize("form", ["seed-vectors", "noise-vectors"])
def test_writes_nothing_else(form, layouts, backend):
    if backend == "reference":
        pytest.skip("torch's own operators write where torch says")
    x, model_output, arguments = make((2, 3, 5, 7), DTYPES["fp32-bf16"], FORMS[form], layouts=layouts)
    with guarded_outputs(backend, layouts[0]) as outputs, torch.enable_grad():
        step = consistency_step(x.requires_grad_(), model_output, **arguments, backend=backend)
        step.model_input.sum().backward()
    assert len(outputs) == 5 + ("noise" in form)


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0)])
def test_empty(shape, backend):
    x, model_output, arguments = make(shape, DTYPES["fp32"], FORMS["seed"])
    assert all(t is None or t.shape == x.shape for t in consistency_step(x, model_output, **arguments, backend=backend))


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_nan_passes_through_the_clip(backend):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.5]])
    step = consistency_step(x, torch.zeros_like(x), 1.0, 1.0, clip=2.0, backend=backend)
    torch.testing.assert_close(step.denoised, torch.tensor([[math.nan, 2.0, -2.0, 0.5]]), equal_nan=True)


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_model_input_comes_from_the_unrounded_sample(backend):
    x = torch.full((1, 8), 1.0 + 2.0**-7, dtype=torch.bfloat16)
    step = consistency_step(x, torch.zeros(1, 8), 1.0, 0.0, alpha=1.0 + 2.0**-9, input_scale=1.0, backend=backend)
    torch.testing.assert_close(step.model_input, torch.full((1, 8), (1 + 2.0**-7) * (1 + 2.0**-9)), rtol=1e-6, atol=0)


def gradients(x, model_output, arguments, outputs, grads, backend):
    leaves = [t.detach().requires_grad_() for t in (x, model_output)]
    arguments = dict(arguments)
    if isinstance(arguments.get("noise"), Tensor):
        leaves.append(arguments["noise"].detach().requires_grad_())
        arguments["noise"] = leaves[-1]
    step = consistency_step(*leaves[:2], **arguments, backend=backend)
    used = [(getattr(step, name), grads[name]) for name in outputs]
    return torch.autograd.grad([y for y, _ in used], leaves, [g.to(y.dtype) for y, g in used])


def check_gradients(x, model_output, arguments, outputs, grads, backend):
    exact = gradients(wide(x), wide(model_output), wide(arguments), outputs, wide(grads), "reference")
    expected = gradients(x, model_output, arguments, outputs, grads, "reference")
    actual = gradients(x, model_output, arguments, outputs, grads, backend)
    for name, a, e, p in zip(("x", "model_output", "noise"), actual, exact, expected, strict=False):
        assert memory_strides(a) == memory_strides(p), name
        assert_as_accurate(name, a, e, p)


def make_gradients(shape, dtypes, layout, seed=1):
    g = torch.Generator().manual_seed(seed)
    names = {"denoised": dtypes[0], "sample": dtypes[0], "model_input": dtypes[1]}
    return {k: guarded(torch.randn(shape, generator=g).to(dtype), layout) for k, dtype in names.items()}


OUTPUTS = ("denoised", "sample", "model_input")
FAR_CLIP = {"clip": 20.0}  # clipped elements are the same at every precision: nothing lies near the bound

# seed, draw, first_sample
INDICES = {
    "small": (7, 1, 0),
    "32-bits": (2**32 - 1, 0, 5),
    "33-bits": (2**32, 2, 1),
    "high-word": ((0xFEDCBA98 << 32) + 0x87654321, 2**32 - 1, 2**31 - 1),
    "63-bits": (2**63 - 1, 1, 2**31),
    "64-bits": (2**63, 1, 3),
    "largest": (2**64 - 1, 3, 2**32 - 2),
}


def on_device(seed, first_sample):
    """The indices as tensors: of no dimension and of one, which lies within others."""
    signed = seed - 2**64 if seed >= 2**63 else seed
    return {"seed": torch.tensor(signed), "first_sample": torch.tensor([-1, first_sample, -1])[1:2]}


def assert_same_step(x, model_output, arguments, indices, backend):
    seed, draw, first_sample = indices
    host = {"seed": seed, "first_sample": first_sample}
    device = on_device(**host)
    rest = arguments | {"draw": draw, "backend": backend}
    expected = consistency_step(x, model_output, **rest | host)
    for some in (device, host | {"seed": device["seed"]}, host | {"first_sample": device["first_sample"]}):
        actual = consistency_step(x, model_output, **rest | some)
        for name, a, e in zip(actual._fields, actual, expected, strict=True):
            assert memory_strides(a) == memory_strides(e), name
            assert torch.equal(a, e), name


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_indices_on_the_device(indices, layouts, backend):
    x, model_output, arguments = make((2, 3, 6, 4), DTYPES["fp32"], FORMS["seed-vectors"], layouts=layouts)
    assert_same_step(x, model_output, arguments, indices, backend)


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_indices_on_the_device_in_every_shape(shape, dtypes, backend):
    for layouts in ("cc", "ll"):
        x, model_output, arguments = make(shape, dtypes, FORMS["seed-vectors"], layouts=layouts)
        assert_same_step(x, model_output, arguments, INDICES["high-word"], backend)


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_indices_on_the_device_in_every_layout(view, backend):
    x = view(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    arguments = {"a": 0.5, "b": -0.7, "beta": 0.3, "input_scale": 1.7}
    assert_same_step(x, x, arguments, INDICES["high-word"], backend)


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_sample_indices_on_the_device_wrap_around(backend):
    x = torch.zeros(3, 2, 4)
    k = {"beta": 1.0, "seed": 3, "backend": backend}
    actual = consistency_step(x, x, 0.0, 0.0, first_sample=torch.tensor(2**32 - 1), **k).sample
    last, first = (
        consistency_step(x[:n], x[:n], 0.0, 0.0, first_sample=i, **k).sample for n, i in ((1, 2**32 - 1), (2, 0))
    )
    assert torch.equal(actual, torch.cat((last, first)))


@pytest.mark.parametrize("backend", served("consistency_step_backward"))
def test_gradients_with_indices_on_the_device(backend):
    x, model_output, arguments = make((2, 3, 5, 4), DTYPES["fp32"], FORMS["seed-vectors"] | FAR_CLIP, layouts="ll")
    grads = make_gradients((2, 3, 5, 4), DTYPES["fp32"], "l")
    expected = gradients(x, model_output, arguments, OUTPUTS, grads, backend)
    arguments |= on_device(arguments["seed"], arguments["first_sample"])
    actual = gradients(x, model_output, arguments, OUTPUTS, grads, backend)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("names", [("seed",), ("first_sample",), ("seed", "first_sample")], ids="+".join)
def test_vmap_over_indices(names, backend):
    x, model_output, _ = make((2, 3, 4, 4), DTYPES["fp32"], FORMS["seed"])
    indices = {"seed": torch.tensor([5, -1, 2**40]), "first_sample": torch.tensor([[0], [4], [9]])}

    def step(mapped):
        k = {"seed": 7, "first_sample": 1} | mapped
        return consistency_step(x, model_output, 0.5, 0.7, beta=0.3, draw=2, **k, backend=backend).sample

    mapped = {name: indices[name] for name in names}
    actual = torch.func.vmap(step)(mapped)
    for i, sample in enumerate(actual):
        torch.testing.assert_close(sample, step({name: values[i] for name, values in mapped.items()}))


@pytest.mark.parametrize("backend", served("consistency_step_backward"))
@pytest.mark.parametrize("layouts", ["cc", "ll", "lc"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients(shape, dtypes, layouts, backend):
    x, model_output, arguments = make(shape, dtypes, FORMS["noise-vectors"] | FAR_CLIP, layouts=layouts)
    x[(0,) * x.ndim] = x[(-1,) * x.ndim] = 64.0
    check_gradients(x, model_output, arguments, OUTPUTS, make_gradients(shape, dtypes, layouts[0]), backend)


@pytest.mark.parametrize("backend", served("consistency_step_backward"))
@pytest.mark.parametrize(
    "outputs", [("denoised",), ("sample",), ("model_input",), ("denoised", "model_input")], ids="+".join
)
@pytest.mark.parametrize("form", ["noise-vectors", "seed-vectors", "alpha-only"])
def test_gradients_of_some_outputs(form, outputs, backend):
    x, model_output, arguments = make((2, 3, 5, 4), DTYPES["fp32"], FORMS[form], layouts="ll")
    leaves = [t.detach().requires_grad_() for t in (x, model_output)]
    check_gradients(*leaves, arguments, outputs, make_gradients((2, 3, 5, 4), DTYPES["fp32"], "c"), backend)


@pytest.mark.parametrize("backend", served("consistency_step_backward"))
def test_gradient_of_a_sum_has_no_strides(backend):
    x, model_output, arguments = make((2, 3, 5, 4), DTYPES["fp32"], FORMS["noise-vectors"], layouts="lc")
    ones = dict.fromkeys(OUTPUTS, torch.ones(()).expand(2, 3, 5, 4))
    check_gradients(x, model_output, arguments, OUTPUTS, ones, backend)


@pytest.mark.parametrize("backend", served("consistency_step_backward"))
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 7),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    dtypes=st.sampled_from(list(DTYPES.values())),
    layouts=st.sampled_from(list(LAYOUTS.values())),
    outputs=st.sets(st.sampled_from(["sample", "model_input"]), min_size=1).map(sorted),
    seed=st.integers(0, 100),
)
def test_gradients_drawn(backend, n, channels, spatial, dtypes, layouts, outputs, seed):
    shape = (n, channels, *spatial)
    x, model_output, arguments = make(shape, dtypes, FORMS["noise-vectors"], seed, layouts)
    check_gradients(x, model_output, arguments, outputs, make_gradients(shape, dtypes, layouts[1]), backend)


@pytest.mark.parametrize("backend", served("consistency_step_backward"))
def test_gradient_is_zero_where_clipped(backend):
    x = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 1.5]], requires_grad=True)
    f = torch.zeros(1, 5, requires_grad=True)
    consistency_step(x, f, 1.0, 2.0, clip=(-1.0, 1.0), backend=backend).denoised.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    assert f.grad.tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form):
    x, model_output, arguments = make((2, 3, 2, 2), (torch.float64, torch.float64), form)
    leaves = [t.detach().requires_grad_() for t in (x, model_output)]
    noise = arguments.pop("noise", None)
    if noise is not None:
        leaves.append(noise.detach().requires_grad_())

    def f(x, model_output, noise=None):
        step = consistency_step(x, model_output, **arguments, noise=noise, backend="reference")
        return tuple(t for t in step if t is not None)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize(("form", "layout"), [("clip", "c"), ("noise-vectors", "l"), ("seed-vectors", "c")])
def test_opcheck(form, layout, backend):
    x, f, k = make((2, 3, 4, 4), DTYPES["fp32-bf16"], FORMS[form], layouts=layout * 2)
    vectors = [
        v if isinstance(v := k.get(name), Tensor) else None for name in ("a", "b", "alpha", "beta", "input_scale")
    ]
    scalars = [0.5, -0.7, 0.9, 0.3, 1.7]
    sample = "clip" not in k
    seed = -5 if "seed" in k else None  # of 2⁶⁴ − 5: the schema's integers are signed
    args = (x, f, vectors, scalars, -0.8, 0.8, k.get("noise"), seed, 3, 1, sample, sample, backend)
    torch.library.opcheck(torch.ops.cmfast.consistency_step.default, args)
    if seed is not None:
        args = (*args[:7], None, 3, 0, *args[10:], torch.tensor([-5]), torch.tensor(1))
        torch.library.opcheck(torch.ops.cmfast.consistency_step.default, args)
    grads = [torch.randn_like(x), torch.randn_like(x) if sample else None, torch.randn_like(f) if sample else None]
    args = (grads, x, f, vectors, scalars, -0.8, 0.8, torch.float32 if "noise" in k else None, backend)
    torch.library.opcheck(torch.ops.cmfast.consistency_step_backward.default, args)


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("form", ["clip", "noise-vectors", "seed-vectors"])
def test_compiles_into_one_graph(form, backend):
    x, model_output, arguments = make((2, 3, 4, 4), DTYPES["fp32"], FORMS[form], layouts="ll")
    leaves = [x.detach().requires_grad_(), model_output.detach().requires_grad_()]

    def f(x, model_output):
        step = consistency_step(x, model_output, **arguments, backend=backend)
        return tuple(t for t in step if t is not None)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), f(*leaves))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), f(*leaves))
    expected = torch.autograd.grad(sum(y.square().sum() for y in f(*leaves)), leaves)
    actual = torch.autograd.grad(sum(y.square().sum() for y in compiled(*leaves)), leaves)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_a_seed_that_is_negated_when_it_is_read(backend):
    x, model_output, arguments = make((2, 3, 4, 4), DTYPES["fp32"], FORMS["seed-vectors"])
    negated = arguments | {"seed": torch._neg_view(torch.tensor(-5)), "first_sample": torch._neg_view(torch.tensor(-1))}
    found = consistency_step(x, model_output, **negated, backend=backend)
    wanted = consistency_step(x, model_output, **arguments | {"seed": 5, "first_sample": 1}, backend=backend)
    assert torch.equal(found.sample, wanted.sample)


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_one_compiled_graph_serves_every_seed_on_the_device(backend):
    x, model_output, arguments = make((2, 3, 4, 4), DTYPES["fp32"], FORMS["seed-vectors"], layouts="ll")
    graphs = []

    def f(x, seed, first_sample):
        k = arguments | {"seed": seed, "first_sample": first_sample}
        return consistency_step(x, model_output, **k, backend=backend).model_input

    def count(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=count)
    with torch.no_grad():
        for seed, _, first_sample in INDICES.values():
            assert torch.equal(compiled(x, **on_device(seed, first_sample)), f(x, seed, first_sample))
    assert len(graphs) == 1
    leaf = x.detach().requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(leaf, **on_device(5, 6)).square().sum(), leaf)
    (expected,) = torch.autograd.grad(f(leaf, 5, 6).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def step_of(x, **indices):
    return consistency_step(x, x, 1.0, 1.0, beta=1.0, **{"seed": 1} | indices)


@pytest.mark.parametrize("name", ["seed", "first_sample"])
@pytest.mark.parametrize(
    ("value", "given"),
    [
        (torch.tensor(3, dtype=torch.int32), "[] torch.int32 on cpu"),
        (torch.tensor([3.0]), "[1] torch.float32 on cpu"),
        (torch.tensor([3, 4]), "[2] torch.int64 on cpu"),
        (torch.tensor([[3]]), "[1, 1] torch.int64 on cpu"),
        (torch.zeros(0, dtype=torch.int64), "[0] torch.int64 on cpu"),
        (torch.tensor(3, device="meta"), "[] torch.int64 on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_indices_on_the_device(name, value, given):
    expected = f"{name} must be an integer, or an int64 tensor [] or [1] on the device of x (cpu), got {given}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        step_of(torch.ones(2, 3, 4, 4), **{name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: consistency_step(x.long(), x, 1.0, 1.0), "floating-point tensors"),
        (lambda x: consistency_step(x, x.long(), 1.0, 1.0), "floating-point tensors"),
        (lambda x: consistency_step(x[0, 0, 0], x[0, 0, 0], 1.0, 1.0), "floating-point tensors"),
        (lambda x: consistency_step(x, x[:1], 1.0, 1.0), "shape of x"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, clip=0.0), "clip must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, clip=-1.0), "clip must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, clip=(1.0, -1.0)), "clip must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, noise=x[:1]), "noise must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, noise=x.long()), "noise must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, noise=x, seed=1), "noise or seed, not both"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, seed=1), "without beta"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, alpha=1.0, noise=x), "without beta"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0), "without the noise"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, input_scale=1.0), "give alpha or beta"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, seed=-1), "seed must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, seed=2**64), "seed must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, seed=1, draw=-1), "draw must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, seed=1, draw=2**32), "draw must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, seed=1, first_sample=-1), "sample indices"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, beta=1.0, seed=1, first_sample=2**32 - 1), "sample indices"),
        (lambda x: consistency_step(x, x, torch.ones(3), 1.0), "coefficient must be"),
        (lambda x: consistency_step(x, x, 1.0, torch.ones(2).long()), "coefficient must be"),
        (lambda x: consistency_step(x, x, 1.0, 1.0, alpha=torch.ones(2, 1)), "coefficient must be"),
        (lambda x: consistency_step(x, x, torch.ones(2, requires_grad=True), 1.0), "cannot require a gradient"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4, 4))
