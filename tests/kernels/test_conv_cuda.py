"""The convolution of csrc/cuda: which calls it serves, how it divides them, and the bits of its results."""

import contextlib
import importlib.util
import itertools
import math
from unittest import mock

import pytest
import torch
from cmfast.kernels import BackendError, backends, conv2d, prepare_conv
from cmfast.kernels.conv_arguments import ConvArguments
from cmfast.kernels.conv_weights import pack
from cmfast.kernels.cuda import conv as conv_cuda
from cmfast.kernels.cuda import conv_plan

from .backends import ON_GPU, served
from .memory import GUARD
from .test_conv import SIXTEEN_BIT, make

CUDA = [backend for backend in served("conv2d") if backend.values[0] == "cuda"]
IN_ORDER = CUDA[:1]


@pytest.fixture
def _six_programs(monkeypatch):
    monkeypatch.setattr(conv_plan, "PROGRAMS", 6)


@contextlib.contextmanager
def guarded_outputs():
    """Give what the operator asks memory for guards around it, which must be whole at the end; the list of them."""
    made = []

    def empty_inside(like, shape, dtype=None):
        shape = (shape,) if isinstance(shape, int) else shape
        size = math.prod(shape)
        made.append(torch.full((size + 2 * GUARD,), 3.0, dtype=dtype or like.dtype, device=like.device))
        return made[-1][GUARD : GUARD + size].view(tuple(shape)).fill_(torch.nan)

    with mock.patch.object(torch.Tensor, "new_empty", empty_inside):
        yield made
    for memory in made:
        assert (memory[:GUARD] == 3.0).all()
        assert (memory[-GUARD:] == 3.0).all()


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", IN_ORDER)
@pytest.mark.parametrize("name", ["odd", "pair"])
def test_writes_nothing_else(name, backend):
    *sizes, pair, parts = SIXTEEN_BIT[name]
    x, prepared, arguments = prepared_for((*sizes, 3, 1, 1), parts, pair)
    with guarded_outputs() as made:
        out, moments = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    assert len(made) == 3  # out, moments and the workspace
    assert out.isfinite().all()
    assert moments.isfinite().all()


def prepared_for(shape, parts=(), pair=0, dtype=torch.bfloat16, seed=0):
    """x, prepared weights and the named arguments, all in one dtype."""
    x, weight, bias, arguments = make(shape, dtype, "l", seed, pair, parts)
    *sizes, stride, padding = shape[3:5], *shape[-2:]
    height, width = (2 * s if "nearest" in parts else s for s in sizes[0])
    prepared = prepare_conv(weight, bias, stride=stride, padding=padding, height=height, width=width)
    return x, prepared._replace(packed=None, dtype=dtype), arguments


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize(
    ("shape", "parts", "segments"),
    [((3, 24, 40, 9, 21, 3, 1, 1), (), 1), ((2, 72, 64, 9, 8, 3, 1, 1), ("affine",), 2)],
    ids=["tiles", "segments"],
)
def test_a_sample_has_the_same_bits_in_any_batch_and_run(shape, parts, segments, backend):
    n, c, columns, h, w, *_ = shape
    assert (conv_plan.plan(h, w, columns, [c]).segments > 1) == (segments > 1)
    x, prepared, arguments = prepared_for(shape, ("residual", *parts))
    y, moments = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    again = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    assert torch.equal(again.out, y)
    assert torch.equal(again.moments, moments)
    rows = {name: t[n - 1 :] for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    alone = conv2d(x[n - 1 :], prepared, **{**arguments, **rows}, moments=True, backend=backend)
    assert torch.equal(alone.out[0], y[n - 1])
    assert torch.equal(alone.moments[0], moments[n - 1])


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", IN_ORDER)
def test_gain_and_offset_without_silu_and_silu_without_them(backend):
    x, prepared, arguments = prepared_for((1, 40, 40, 9, 21, 3, 1, 1), ("affine",))
    given = [arguments | {"silu": False}, {"silu": True}, arguments]
    outputs = [conv2d(x, prepared, **some, backend=backend).out for some in given]
    for some, out in zip(given, outputs, strict=True):
        torch.testing.assert_close(out, conv2d(x, prepared, **some, backend="reference").out, rtol=2e-2, atol=3e-2)
    assert all((a - b).abs().max() > 0.5 for a, b in itertools.pairwise(outputs))


def off_by_one(t):
    """The same values, of images channels last, behind one element that is NaN: none of their vectors is aligned."""
    memory = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    last = t.movedim(1, -1) if t.ndim == 4 else t
    view = memory[1:].view(last.shape).copy_(last)
    return view.movedim(-1, 1) if t.ndim == 4 else view


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", IN_ORDER)
def test_what_is_not_aligned_is_copied(backend):
    x, prepared, arguments = prepared_for((1, 24, 40, 9, 21, 3, 1, 1), ("affine", "residual"))
    expected = conv2d(x, prepared, **arguments, backend=backend).out
    apart = {name: off_by_one(t) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    packed = off_by_one(pack(prepared.weight, torch.bfloat16))
    odd = prepared._replace(packed=packed, bias=off_by_one(prepared.bias))
    assert torch.equal(conv2d(off_by_one(x), odd, **apart, backend=backend).out, expected)


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", IN_ORDER)
def test_nan_stays_nan_under_relu(backend):
    x, prepared, _ = prepared_for((1, 40, 40, 9, 21, 3, 1, 1))
    x[0, 39, 4, 16] = torch.nan
    y = conv2d(x, prepared, relu=True, backend=backend).out
    assert torch.equal(y[0, 0].isnan().nonzero(), torch.cartesian_prod(torch.arange(3, 6), torch.arange(15, 18)))


SERVED = (1, 32, 32, 16, 48, 3, 1, 1)
REFUSALS = {
    "float32": (SERVED, (), {"dtype": torch.float32}, {}, "got float32 products of float32"),
    "another-dtype": (SERVED, (), {}, {"dtype": torch.float32}, "got float32 products of bfloat16"),
    "1x1": (
        (1, 32, 32, 16, 48, 1, 1, 0),
        (),
        {},
        {},
        r"3 x 3 elements.*got 1 x 1 with stride \(1, 1\) and padding \(0",
    ),
    "stride": ((1, 32, 32, 16, 48, 3, 2, 1), (), {}, {}, r"with stride \(2, 2\)"),
    "padding": ((1, 32, 32, 16, 48, 3, 1, (0, 1, 0, 1)), (), {}, {}, r"padding \(0, 1, 0, 1\)"),
    "channels": ((1, 36, 32, 16, 48, 3, 1, 1), (), {}, {}, "8 channels at a time, got 36 channels to 32"),
    "outputs": ((1, 32, 3, 16, 48, 3, 1, 1), (), {}, {}, "got 32 channels to 3"),
    "pair": (SERVED, (), {"pair": 20}, {}, "got 20 and 12 channels to 32"),
    "average": (SERVED, ("average",), {}, {}, "no input with an average pooling"),
    "few-blocks": ((1, 32, 32, 8, 8, 3, 1, 1), (), {}, {}, "1 blocks, all that 8 x 8 positions and 32 channels give"),
}


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", IN_ORDER)
@pytest.mark.parametrize("name", REFUSALS)
def test_what_it_refuses(name, backend):
    shape, parts, given, replaced, reason = REFUSALS[name]
    x, prepared, arguments = prepared_for(shape, parts, **given)
    prepared = prepared._replace(**replaced)
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot serve conv2d: .*{reason}"):
        conv2d(x, prepared, **arguments, backend=backend)


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.parametrize("backend", IN_ORDER)
def test_a_gate_and_a_large_sample_are_refused(backend):
    x, prepared, _ = prepared_for(SERVED)
    with pytest.raises(BackendError, match="no input with a gate"):
        conv2d((x, x), prepared, gate="silu", backend=backend)
    h = torch.empty(2, 1 << 14, 1 << 14, 8, device="meta", dtype=torch.bfloat16).movedim(-1, 1)
    a = ConvArguments(h, None, torch.empty(32, 8, 3, 3), None, None, 1, False, (1, 1), (1,) * 4, torch.bfloat16)
    assert conv_cuda.serves(a) == (
        False,
        "the CUDA kernel serves samples that reach over less than 2^31 elements, got 8589934592",
    )


@pytest.mark.usefixtures("_six_programs")
@pytest.mark.skipif(ON_GPU, reason="launches with the emulation")
@pytest.mark.parametrize("backend", IN_ORDER)
def test_auto_takes_triton_first_and_cuda_in_the_other_order(backend, monkeypatch):
    x, prepared, _ = prepared_for(SERVED)
    a = ConvArguments(x, None, *prepared)
    first = "cuda" if importlib.util.find_spec("triton") is None else "triton"
    assert backends.resolve("conv2d", [x], None, (a,)).__module__.split(".")[2] == first
    monkeypatch.setattr(backends, "ORDERS", {})
    assert backends.resolve("conv2d", [x], None, (a,)).__module__ == "cmfast.kernels.cuda.conv"
    refused = a._replace(dtype=torch.float32)
    assert backends.resolve("conv2d", [x], None, (refused,)).__module__ != "cmfast.kernels.cuda.conv"


# Height and width, output channels, input channels; the tile's width, blocks, segments.
LAYERS = {
    "imagenet64-64": ((64, 64), 192, [192], 16, 192, 1),
    "imagenet64-join": ((64, 64), 192, [384, 192], 16, 192, 1),
    "imagenet64-32": ((32, 32), 384, [384], 16, 192, 2),
    "imagenet64-16": ((16, 16), 576, [576], 16, 180, 5),
    "imagenet64-8": ((8, 8), 768, [768], 8, 144, 6),
    "lsun256": ((256, 256), 256, [256], 16, 4096, 1),
    "wide-input": ((64, 64), 192, [1536], 16, 384, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_plans(name):
    sizes, columns, sources, width, programs, segments = LAYERS[name]
    plan = conv_plan.plan(*sizes, columns, sources)
    assert (plan.tile_width, plan.programs, plan.segments) == (width, programs, segments)
    assert plan.segment * segments >= sum(-(-c // 32) for c in sources) > plan.segment * (segments - 1)


def test_the_tile_moves_less_than_a_plain_product():
    """192 → 192 at 64 x 64, where a plain product of 64 x 64 tiles asks for 2,629,776 sectors."""
    assert conv_plan.plan(64, 64, 192, [192]).sectors == 414_720 + 663_552
