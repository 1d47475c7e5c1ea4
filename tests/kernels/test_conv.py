import functools
import math
import pickle

import pytest
import torch
from cmfast.kernels import (
    CONV_FORMS,
    BackendError,
    conv2d,
    fold_group_norm,
    group_norm,
    native,
    prepare_conv,
    use_backend,
)
from cmfast.kernels.backends import resolve
from cmfast.kernels.conv_arguments import ConvArguments
from cmfast.kernels.conv_forms import SPLIT, has_tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from .backends import ON_GPU, served
from .memory import guarded, memory_strides
from .tolerance import assert_as_accurate, error
from .winograd import convolve, error_scale

pytestmark = pytest.mark.usefixtures("fewer_programs")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}

FORMS = {"chosen": (None, None), "direct": (1, False)}
FORMS |= {f"F{tile}{'' if packed else '-at-use'}": (tile, packed) for tile, packed in CONV_FORMS[torch.float32][1:]}
FORMS["split"] = SPLIT[:2]

# N, C, Cout, *sizes, k, stride, padding: whole tiles and panels, and one more or less of each. The last three are one
# number, or one for each dimension; padding may be two for each.
SHAPES = {
    "3x3-whole": (1, 32, 48, 16, 16, 3, 1, 1),
    "3x3-odd": (2, 17, 50, 9, 11, 3, 1, 1),
    "3x3-images": (3, 3, 16, 8, 8, 3, 1, 1),
    "3x3-one-row": (1, 20, 33, 1, 70, 3, 1, 1),
    "3x3-long": (1, 150, 120, 8, 8, 3, 1, 1),
    "3x3-one-position": (2, 65, 3, 1, 1, 3, 1, 1),
    "3x3-valid": (1, 8, 15, 12, 7, 3, 1, 0),
    "3x3-wide-padding": (1, 5, 4, 6, 6, 3, 1, 3),
    "3x3-wide-row": (1, 2, 4, 3, 300, 3, 1, 1),
    "3x3-stride-2": (2, 40, 24, 13, 14, 3, 2, 1),
    "1x1": (2, 49, 97, 5, 13, 1, 1, 0),
    "1x1-stride-2": (1, 16, 16, 7, 7, 1, 2, 0),
    "5x5": (1, 6, 7, 9, 8, 5, 1, 2),
    "7x7-valid": (1, 5, 7, 9, 10, 7, 1, 0),
    "9x9": (1, 5, 7, 10, 9, 9, 1, 4),
    "2x2-stride-2": (1, 7, 5, 8, 6, 2, 2, 0),
    "1x3": (2, 17, 9, 5, 11, (1, 3), 1, (0, 1)),
    "3x1": (2, 17, 9, 5, 11, (3, 1), 1, (1, 0)),
    "2x5-strides": (1, 6, 7, 9, 14, (2, 5), (1, 3), (1, 2)),
    "3x3-right-and-bottom": (1, 18, 20, 9, 8, 3, 2, (0, 1, 0, 1)),
    "3x3-left-and-top": (1, 18, 20, 9, 8, 3, 2, (1, 0, 1, 0)),
    "3x3-all-sides-apart": (2, 19, 50, 10, 7, 3, 1, (0, 3, 2, 1)),
    "1x1-padded-below": (1, 5, 4, 3, 6, 1, 1, (0, 1, 0, 0)),
    "1x1-strides": (1, 5, 4, 3, 6, 1, (1, 2), 0),
    "audio-3": (2, 17, 50, 133, 3, 1, 1),
    "audio-3-short": (3, 33, 5, 1, 3, 1, 1),
    "audio-4-stride-2": (1, 6, 20, 31, 4, 2, (1, 2)),
    "audio-1": (2, 49, 20, 70, 1, 1, 0),
    "video-3x3x3": (2, 17, 50, 4, 9, 7, 3, 1, 1),
    "video-one-image": (1, 20, 8, 1, 5, 6, 3, 1, 1),
    "video-of-a-position": (3, 18, 5, 5, 1, 1, 3, 1, 1),
    "video-3x3x3-long": (1, 70, 100, 3, 8, 8, 3, 1, 1),
    "video-of-all-strides": (1, 9, 17, 6, 9, 8, 3, (2, 1, 1), 1),
    "video-3x3x3-stride-2": (2, 9, 17, 5, 9, 8, 3, 2, 1),
    "video-3x1x1": (1, 20, 24, 5, 4, 3, (3, 1, 1), 1, (1, 0, 0)),
    "video-1x3x3": (2, 20, 24, 3, 7, 5, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "video-2x3x3-apart": (1, 20, 24, 4, 7, 5, (2, 3, 3), 1, (1, 0, 0, 2, 2, 1)),
    "video-5x5x5": (1, 5, 7, 4, 6, 5, 5, 1, 2),
    "video-1x1x1": (2, 49, 33, 3, 5, 4, 1, 1, 0),
    "video-1x1x1-apart": (1, 20, 24, 3, 4, 5, 1, 1, (0, 2, 1, 0, 0, 1)),
    "video-1x1x1-stride-2": (1, 16, 16, 5, 4, 4, 1, (2, 1, 1), 0),
}
#: The backends that serve all convolutions: "cuda" serves those of `test_sixteen_bit_products`.
ANY = [backend for backend in served("conv2d") if backend.values[0] != "cuda"]
#: Backends of the direct form alone, which they take whatever the weights were prepared for.
DIRECT = ("cuda", "triton")
#: Those that Winograd's forms serve.
WINOGRAD = [
    name
    for name, (*_, k, stride, _) in SHAPES.items()
    if (k in (3, (2, 3, 3), (1, 3, 3)) and stride in (1, (2, 1, 1), (1, 1, 1)) and not name.startswith("audio"))
]


RESIDUALS = {"residual": None, "residual_nearest": "nearest", "residual_average": "average"}


def resampled(sizes, resample):
    """The depth of a video stays as it is."""
    factors = (1, 2, 2) if len(sizes) == 3 else (2, 2)
    return [
        {None: s, "nearest": factor * s, "average": s // factor}[resample]
        for s, factor in zip(sizes, factors[: len(sizes)], strict=True)
    ]


def spread(value, dims):
    """A number for each spatial dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def sides(padding, dims):
    """What is padded before and after each dimension."""
    given = spread(padding, dims)
    return given if len(given) == 2 * dims else tuple(p for p in given for _ in range(2))


def outputs(sizes, k, stride, padding):
    dims, around = len(sizes), sides(padding, len(sizes))
    padded = [s + a + b for s, a, b in zip(sizes, around[::2], around[1::2], strict=True)]
    return [(s - k) // step + 1 for s, k, step in zip(padded, spread(k, dims), spread(stride, dims), strict=True)]


def named(sizes):
    """The sizes as prepare_conv takes them."""
    return dict(zip(("depth", "height", "width")[-len(sizes) :], sizes, strict=True))


def make(shape, dtype=torch.float32, layout="l", seed=0, pair=0, parts=()):
    """x or a pair, weight, bias and the named arguments, with NaN around the tensors of the input's size."""
    n, c, out, *spatial, k, stride, padding = shape
    kernel = spread(k, len(spatial))
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g)

    x = draw(n, c, *spatial).to(dtype)
    weight, bias = draw(out, c, *kernel) / (c * math.prod(kernel)) ** 0.5, draw(out)
    arguments = {}
    if "affine" in parts:
        arguments |= {"gain": guarded(draw(n, c)), "offset": guarded(draw(n, c)), "silu": True}
    for name in ("nearest", "average"):
        if name in parts:
            arguments["resample"] = name
    sizes = outputs(resampled(spatial, arguments.get("resample")), k, stride, padding)
    for part, resample in RESIDUALS.items():
        if part in parts:
            depth, plane = sizes[:-2], sizes[-2:]
            size = {"nearest": [s // 2 for s in plane], "average": [2 * s + 1 for s in plane]}.get(resample, plane)
            size = [*depth, *size]
            arguments |= {"residual": guarded(draw(n, out, *size).to(dtype), layout), "residual_resample": resample}
    tensors = [guarded(t, layout) for t in ((x[:, :pair], x[:, pair:]) if pair else (x,))]
    return tuple(tensors) if pair else tensors[0], weight, bias, arguments


def wide(value):
    if isinstance(value, dict):
        return {k: wide(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(wide, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def activated(x, arguments):
    """The input of the products in float64, and what its own error is relative to."""
    if "gate" in arguments:
        u = x[0].double() * GATES[arguments["gate"]](x[1].double())
    else:
        u = torch.cat(x, 1).double() if isinstance(x, tuple) else x.double()
    size = u.abs()
    if "gain" in arguments:
        gain, offset = (along(arguments[name].double(), u) for name in ("gain", "offset"))
        size = (u * gain).abs() + offset.abs()
    return RESAMPLE[arguments.get("resample")](size)


def along(rows, image):
    """Rows [N, C] or [C] as they act on all positions of an image."""
    return rows[(..., *(None,) * (image.ndim - 2))]


def factors(t):
    return (1, 2, 2) if t.ndim == 5 else (2,) * (t.ndim - 2)


GATES = {"gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "silu": F.silu}
RESAMPLE = {
    None: lambda t: t,
    "nearest": lambda t: F.interpolate(t, scale_factor=tuple(map(float, factors(t)))),
    "average": lambda t: (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[t.ndim - 3](t, factors(t)),
}


def check(x, weight, bias, arguments, stride, padding, tile, products, backend, transformed=None, as_plain=True):
    """Within the stated bound; the direct form in float32 as accurate as plain PyTorch where `as_plain` asks for it.

    Of a single output channel, say, or of a single image of a video on Zen 5, plain PyTorch takes sums of many short
    parts, the kernels one of up to 256 terms: there the largest error of a few outputs may be more than twice as large.
    """
    if backend in DIRECT and (tile, transformed) != (None, None):
        pytest.skip("there is no other form")
    spatial = (x[0] if isinstance(x, tuple) else x).shape[2:]
    prepared = prepare_conv(
        weight,
        bias,
        stride=stride,
        padding=padding,
        dtype=products,
        **named(resampled(spatial, arguments.get("resample"))),
        tile=tile,
        transformed=transformed,
    )
    exact_weights = prepared._replace(weight=weight.double(), bias=bias.double())
    exact = conv2d(wide(x), exact_weights, **wide(arguments), backend="reference").out
    actual = conv2d(x, prepared, **arguments, backend=backend).out
    plain = conv2d(x, prepared, **arguments, backend="reference").out
    assert memory_strides(actual) == memory_strides(plain)
    assert actual.dtype == plain.dtype
    if backend == "reference":
        return
    around, step = sides(padding, len(spatial)), spread(stride, len(spatial))
    scale = error_scale(activated(x, arguments), weight, prepared.tile, step, around)
    # The transforms and sums, and the rounding of the operands: as conv2d says.
    split = (prepared.tile, prepared.transformed, products) == SPLIT
    operands = 2.0**-16 / torch.finfo(products).eps if split else 4.0 if products == torch.float32 else 1.0
    allowed = operands * torch.finfo(products).eps * scale + 4 * torch.finfo(torch.float32).eps * scale
    allowed = allowed + torch.finfo(torch.float32).eps * along(bias, exact).double().abs()
    if "residual" in arguments:
        residual = RESAMPLE[arguments["residual_resample"]](arguments["residual"].double().abs())
        allowed = allowed + torch.finfo(torch.float32).eps * residual
    allowed = allowed + torch.finfo(actual.dtype).eps * exact.abs()
    assert torch.isfinite(actual).all(), "not finite"
    excess = (actual.double() - exact).abs() - allowed
    assert excess.max() <= 0, f"off by {(actual.double() - exact).abs().max():.3g}, {excess.max():.3g} too much"
    if as_plain and prepared.tile == 1 and products == torch.float32 and not split:
        assert_as_accurate("out", actual, exact, plain, others_error(x, prepared, exact_weights, arguments))


def others_error(x, prepared, exact_weights, arguments):
    """The largest error of plain PyTorch on inputs a little different, on which its rounding falls differently."""
    errors = []
    for i in range(1, 9):
        moved = tuple(t * (1 + i / 64) for t in x) if isinstance(x, tuple) else x * (1 + i / 64)
        exact = conv2d(wide(moved), exact_weights, **wide(arguments), backend="reference").out
        errors.append(error(conv2d(moved, prepared, **arguments, backend="reference").out, exact))
    return max(errors)


def test_definition_is_torchs():
    x, weight, bias, arguments = make((2, 6, 5, 8, 9, 3, 1, 1), torch.float64, parts=("affine", "residual"))
    weight, bias = weight.double(), bias.double()
    prepared = prepare_conv(weight, bias, padding=1, height=8, width=9)
    u = F.silu(x * arguments["gain"].double()[..., None, None] + arguments["offset"].double()[..., None, None])
    expected = F.conv2d(u, weight, bias, padding=1) + arguments["residual"]
    out, moments = conv2d(x, prepared, **wide(arguments), moments=True, backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(moments[:, 0], expected.mean((2, 3)).float())
    torch.testing.assert_close(moments[:, 1], (expected.var((2, 3), correction=0) * 72).float())


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("tile", [None, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_relu_is_the_last(dtype, tile, backend):
    shape = (2, 17, 50, 9, 11, 3, 1, 1)
    x, weight, bias, arguments = make(shape, dtype, parts=("affine", "residual"))
    check(x, weight, bias, arguments | {"relu": True}, 1, 1, tile, torch.float32, backend, as_plain=False)
    prepared = prepare_conv(weight, bias, padding=1, height=9, width=11, tile=tile)
    plain = conv2d(x, prepared, **arguments, backend=backend).out
    y, moments = conv2d(x, prepared, **arguments, relu=True, moments=True, backend=backend)
    assert torch.equal(y, plain.relu())
    assert (y == 0).any()
    torch.testing.assert_close(moments[:, 0], y.float().mean((2, 3)), rtol=2e-3, atol=2e-3)


GATED = {
    "linear": ((90, 37, 50, 1, 1, 1, 1, 0), None),
    "1x1": ((2, 49, 97, 5, 13, 1, 1, 0), None),
    "direct": ((2, 17, 50, 9, 11, 3, 2, 1), None),
    "3x3": ((2, 17, 50, 9, 11, 3, 1, 1), None),
    "video": ((1, 20, 24, 3, 8, 6, 3, 1, 1), 2),
}


def make_gated(name, dtype=torch.float32, layout="l"):
    """The two halves of one tensor's channels, as a feed-forward layer's first linear layer leaves them."""
    shape, tile = GATED[name]
    x, weight, bias, arguments = make(shape, dtype, parts=("residual",))
    both = guarded(torch.cat((x, 3 * x.flip(0)), 1), layout)
    return both.chunk(2, 1), weight, bias, arguments, shape, tile


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize(("gate", "layout"), [*((gate, "l") for gate in GATES), ("gelu", "c")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", GATED)
def test_gated_inputs(name, gate, dtype, layout, backend):
    if backend in DIRECT and not ON_GPU and gate != "gelu" and dtype != torch.float32:
        pytest.skip("a gate of each dtype is enough where launches are interpreted")
    x, weight, bias, arguments, shape, tile = make_gated(name, dtype, layout)
    for products in PRODUCTS.values():
        check(x, weight, bias, arguments | {"gate": gate}, *shape[-2:], tile, products, backend, as_plain=False)
    if name == "3x3":
        resample = {"gate": gate, "resample": "average"}
        check(x, weight, bias, resample, *shape[-2:], tile, torch.float32, backend, as_plain=False)


@pytest.mark.parametrize("gate", GATES)
def test_the_definition_of_a_gate_is_torchs(gate):
    h, g, weight = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7), torch.randn(4, 6, 3, 3)
    out = conv2d((h, g), prepare_conv(weight, padding=1, height=5, width=7), gate=gate, backend="reference").out
    torch.testing.assert_close(out, F.conv2d(h * GATES[gate](g), weight, padding=1))


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_all_sizes(gate, backend):
    """Within four roundings of the activation or of half the gate, tails and infinities included."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, torch.inf, torch.nan])
    x = torch.cat((torch.linspace(-14, 14, 2001 if backend in DIRECT and not ON_GPU else 20001), ends))
    prepared = prepare_conv(torch.ones(1, 1, 1), width=len(x))
    y = conv2d((torch.ones(1, 1, len(x)), x[None, None]), prepared, gate=gate, backend=backend).out[0, 0]
    if backend == "reference":  # torch's own: vectorized for AVX-512, it has a larger error, and makes NaN of infinity
        torch.testing.assert_close(y, GATES[gate](x), rtol=0, atol=0, equal_nan=True)
        return
    expected = GATES[gate](x.double())
    allowed = 4 * torch.finfo(torch.float32).eps * expected.abs().maximum(x.abs().double() / 2) + 1e-37
    finite = x.abs() < 1e38
    assert ((y - expected).abs() <= allowed)[finite].all()
    infinite, nan = y[~finite]
    assert infinite == torch.inf
    assert nan.isnan()


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("kernel", [1, 3])
def test_relu_of_nan_is_nan(kernel, backend):
    x = draw_image(1, 16, 5, 5)
    x[0, 3, 2, 2] = torch.nan
    prepared = prepare_conv(torch.ones(4, 16, kernel, kernel), padding=kernel // 2, height=5, width=5, tile=1)
    y = conv2d(x, prepared, relu=True, backend=backend).out
    assert y[0, :, 2, 2].isnan().all()
    assert not y[0, :, 0, 0].isnan().any()


def draw_image(*size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def test_a_residual_is_resampled_before_it_is_added():
    x, weight, bias, _ = make((2, 3, 4, 8, 10, 3, 1, 1))
    prepared = prepare_conv(weight, bias, padding=1, height=8, width=10)
    for name, residual in {"nearest": torch.randn(2, 4, 4, 5), "average": torch.randn(2, 4, 17, 20)}.items():
        out = conv2d(x, prepared, residual=residual, residual_resample=name, backend="reference").out
        torch.testing.assert_close(out, F.conv2d(x, weight, bias, padding=1) + RESAMPLE[name](residual))


@pytest.mark.parametrize("tile", [2, 4])
def test_the_bounds_matrices_are_winograds(tile):
    u, weight = torch.randn(2, 3, 7, 9, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(convolve(F.pad(u, (1, 1, 1, 1)), weight, tile), F.conv2d(u, weight, padding=1))


#: Shapes of which the kernels are compared with the stated bound alone; see `check`.
OF_SHORT_PARTS = ("video-one-image",)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, form, products, backend):
    if form[0] in (2, 4) and name not in WINOGRAD:
        pytest.skip("Winograd's forms have 3 x 3 kernels of stride 1")
    if form == FORMS["split"]:
        if backend != "cpu" or not has_tiles() or products != torch.float32:
            pytest.skip("operands of float32 are split by tiles alone")
    elif form not in (FORMS["chosen"], *CONV_FORMS[products]):
        pytest.skip("weights are transformed as they are used in float32")
    shape = SHAPES[name]
    x, weight, bias, arguments = make(shape, parts=("affine", "residual"))
    as_plain = name not in OF_SHORT_PARTS
    check(x, weight, bias, arguments, *shape[-2:], form[0], products, backend, form[1], as_plain)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "parts",
    [
        ("nearest", "residual_average"),
        ("affine", "average", "residual"),
        ("affine", "residual_nearest"),
        ("average", "residual_average"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize(
    ("name", "tile"),
    [("audio-3", None), ("audio-4-stride-2", None), ("video-3x3x3", None), ("video-3x3x3", 1), ("video-3x3x3", 2)],
)
def test_parts_of_audio_and_video(name, tile, parts, dtype, layout, backend):
    *sizes, k, stride, padding = SHAPES[name]
    sizes[3:] = [s + s % 2 for s in sizes[3:]]  # so that an upsampled residual fits
    if backend in DIRECT and not ON_GPU:  # the interpreter takes its time for a program
        sizes[:3] = [1, 17, 20]
    x, weight, bias, arguments = make((*sizes, k, stride, padding), dtype, layout, parts=parts)
    check(x, weight, bias, arguments, stride, padding, tile, torch.float32, backend, as_plain=False)


#: N, C, Cout, H, W, channels of the first of a pair, parts: channels that 16-byte vectors divide; tiles of 8 x 16 and
#: of 8 x 8 positions, and steps of 32 channels, whole and with a rest.
SIXTEEN_BIT = {
    "whole": (1, 64, 64, 16, 32, 0, ()),
    "odd": (1, 72, 40, 9, 21, 0, ("affine", "residual")),
    "pair": (1, 104, 72, 7, 6, 40, ("affine", "residual_average")),
    "upsampled": (1, 24, 48, 6, 9, 8, ("affine", "nearest", "residual_nearest")),
    "one-row": (1, 16, 40, 1, 70, 0, ("affine",)),
    "one-position": (2, 40, 136, 1, 1, 0, ("residual",)),
}


@pytest.mark.parametrize("backend", served("conv2d"))
@pytest.mark.parametrize(("name", "layout"), [("odd", "c"), *((name, "l") for name in SIXTEEN_BIT)])
def test_sixteen_bit_products(name, layout, backend):
    *sizes, pair, parts = SIXTEEN_BIT[name]
    x, weight, bias, arguments = make((*sizes, 3, 1, 1), torch.bfloat16, layout, pair=pair, parts=parts)
    check(x, weight, bias, arguments, 1, 1, None, torch.bfloat16, backend, as_plain=False)


def check_moments(x, weight, bias, arguments, backend, **tolerance):
    """Those of 16-bit products, whose sums differ by the order alone, of the output before it is rounded."""
    height, width = resampled((x[0] if isinstance(x, tuple) else x).shape[2:], arguments.get("resample"))
    prepared = prepare_conv(weight, bias, padding=1, height=height, width=width)
    prepared = prepared._replace(packed=None, dtype=torch.bfloat16)
    out, moments = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    assert torch.equal(out, conv2d(x, prepared, **arguments, backend=backend).out)
    exact = prepared._replace(weight=weight.to(torch.bfloat16).double(), bias=bias.double())
    y = conv2d(wide(x), exact, **wide(arguments), backend="reference").out.flatten(2)
    mean = y.mean(2)
    torch.testing.assert_close(moments[:, 0].double(), mean, **tolerance)
    torch.testing.assert_close(moments[:, 1].double(), (y - mean[..., None]).square().sum(2), **tolerance)


@pytest.mark.parametrize("backend", [b for b in served("conv2d") if b.values[0] == "cuda"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 40, 9, 21), (2, 72, 64, 9, 8)], ids=["tiles", "segments"])
def test_moments_of_sixteen_bit_products(shape, relu, backend):
    """A large bias takes none of their digits."""
    x, weight, bias, arguments = make((*shape, 3, 1, 1), torch.bfloat16, "l", parts=("residual",))
    arguments["relu"] = relu
    check_moments(x, weight, bias + 300, arguments, backend, rtol=2e-5, atol=1e-5)


def among_others(x):
    """The same image as a view of one with more channels, which are NaN."""
    n, c, *spatial = x.shape
    view = torch.full((n, *spatial, c + 8), float("nan"), dtype=x.dtype).movedim(-1, 1)[:, :c]
    return view.copy_(x)


@pytest.mark.parametrize("backend", [b for b in served("conv2d") if b.values[0] in DIRECT])
def test_half_products_of_views(backend):
    """float16, whose weights are prepared on a GPU alone, of images that are views of larger ones."""
    (h, skip), weight, bias, arguments = make(
        (2, 56, 40, 9, 10, 3, 1, 1), torch.float16, "l", pair=24, parts=("affine",)
    )
    prepared = prepare_conv(weight, bias, padding=1, height=9, width=10)._replace(packed=None, dtype=torch.float16)
    x = (among_others(h), spread_out(skip))
    for relu in (False, True):
        y = conv2d(x, prepared, **arguments, relu=relu, backend=backend).out
        exact_weights = prepared._replace(weight=weight.double(), bias=bias.double())
        exact = conv2d(wide(x), exact_weights, **wide(arguments), relu=relu, backend="reference").out
        plain = conv2d(x, prepared, **arguments, relu=relu, backend="reference").out
        assert_as_accurate("out", y, exact, plain)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize(("dims", "tile"), [(1, None), (3, None), (3, 1), (3, 2)])
def test_images_that_lie_apart(dims, tile, backend):
    """Views of every other image, row and column: neither the samples nor the images of one follow one another."""
    shape = (2, 19, 20, *(4, 10, 8)[-dims:], 3, 1, 1)
    x, weight, bias, arguments = make(shape, parts=("affine", "residual"))
    arguments["residual"] = spread_out(arguments["residual"])
    check(spread_out(x), weight, bias, arguments, 1, 1, tile, torch.float32, backend, as_plain=False)


def spread_out(x):
    """The same image as a view of one that is larger in all dimensions but the channels."""
    n, c, *spatial = x.shape
    large = torch.full((2 * n, *(2 * s for s in spatial), c), float("nan"), dtype=x.dtype)
    view = large[(slice(None, None, 2),) * (x.ndim - 1)].movedim(-1, 1)
    view.copy_(x)
    return view


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("parts", [(), ("affine",), ("nearest",), ("affine", "average", "residual")], ids="-".join)
@pytest.mark.parametrize("tile", [None, 1])
def test_parts(tile, parts, dtype, layout, backend):
    shape = (2, 19, 20, 10, 6, 3, 1, 1)
    x, weight, bias, arguments = make(shape, dtype, layout, parts=parts)
    check(x, weight, bias, arguments, 1, 1, tile, torch.float32, backend)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("part", ["residual_nearest", "residual_average"])
@pytest.mark.parametrize("tile", [None, 1, 2])
@pytest.mark.parametrize("layout", ["c", "l"])
def test_resampled_residual(layout, tile, part, dtype, backend):
    check_resampled_residual(layout, tile, part, dtype, backend, torch.float32)


def check_resampled_residual(layout, tile, part, dtype, backend, products):
    x, weight, bias, arguments = make((2, 7, 50, 10, 6, 3, 1, 1), dtype, layout, parts=(part,))
    check(x, weight, bias, arguments, 1, 1, tile, products, backend)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("tile", [None, 1, 2])
@pytest.mark.parametrize("parts", [(), ("affine",)], ids=["plain", "affine"])
@pytest.mark.parametrize("split", [1, 8, 16, 21])
def test_pair_is_the_concatenation(split, parts, tile, backend):
    x, weight, bias, arguments = make((2, 40, 24, 7, 5, 3, 1, 1), pair=split, parts=parts)
    check(x, weight, bias, arguments, 1, 1, tile, torch.float32, backend)


#: What blocks of tiles are like: N, C, Cout, *sizes, k, stride, padding, channels of the first of a pair, parts.
TILED = {
    "rows-of-tiles": (1, 64, 64, 5, 32, 3, 1, 1, 32, ("affine", "residual")),
    "rows-across-tiles": (2, 32, 96, 7, 21, 3, 1, 1, 0, ("affine", "residual")),
    "several-images": (5, 64, 33, 4, 4, 3, 1, 1, 32, ("affine", "residual")),
    "blocks-of-rows": (1, 96, 32, 66, 70, 3, 1, 1, 0, ("affine",)),
    "blocks-of-columns": (1, 32, 40, 3, 300, 3, 1, 1, 0, ("residual",)),
    "one-row": (2, 64, 48, 1100, 3, 1, 1, 0, ("affine",)),
    "divided-weights": (1, 1024, 33, 3, 4, 3, 1, 1, 512, ("affine", "residual")),
    "upsampled": (1, 64, 64, 6, 16, 3, 1, 1, 32, ("affine", "nearest", "residual_nearest")),
    "pooled": (1, 64, 40, 6, 32, 3, 1, 1, 0, ("affine", "average", "residual_average")),
    "strided": (2, 32, 64, 9, 32, 3, 2, 1, 0, ("residual",)),
    "pointwise": (2, 64, 96, 9, 16, 1, 1, 0, 32, ("affine", "residual")),
    "video": (1, 64, 32, 3, 5, 16, 3, 1, 1, 0, ("affine", "residual")),
}


@pytest.mark.parametrize("backend", [b for b in ANY if "cpu" in str(b)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", ["bf16", "split"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", TILED)
def test_tiles(name, dtype, form, threads, backend):
    if not has_tiles():
        pytest.skip("the instruction set has no tiles")
    *shape, pair, parts = TILED[name]
    x, weight, bias, arguments = make(shape, dtype, "l", pair=pair, parts=parts)
    products, transformed = (torch.bfloat16, False) if form == "bf16" else (torch.float32, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(x, weight, bias, arguments, *shape[-2:], 1, products, backend, transformed, as_plain=False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [b for b in ANY if "triton" in str(b)])
def test_a_sample_has_the_same_bits_in_any_batch(backend):
    """Of one sample the segments of the sum are taken by a program each, of six by one program."""
    x, weight, bias, arguments = make((6, 20, 33, 5, 6, 3, 1, 1), parts=("residual",))
    prepared = prepare_conv(weight, bias, padding=1, height=5, width=6)
    y, moments = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    for i in (0, 5):
        residual = arguments["residual"][i : i + 1]
        alone = conv2d(x[i : i + 1], prepared, residual=residual, moments=True, backend=backend)
        assert torch.equal(alone.out[0], y[i])
        assert torch.equal(alone.moments[0], moments[i])


@pytest.mark.skipif(ON_GPU, reason="launches with the interpreter")
@pytest.mark.parametrize(
    ("shape", "parts"),
    [((1, 33, 20, 5, 6, 3, 1, 1), ("residual",)), ((2, 33, 70, 5, 7, 1, 1, 0), ("affine", "residual"))],
    ids=["3x3", "1x1"],
)
def test_every_tile_that_may_be_chosen(shape, parts):
    triton = pytest.importorskip("cmfast.kernels.triton.conv", exc_type=ImportError)
    config = pytest.importorskip("cmfast.kernels.triton.conv_config", exc_type=ImportError)
    x, weight, bias, arguments = make(shape, torch.bfloat16, parts=parts)
    packed = triton.pack(weight, torch.bfloat16)
    sides = ((1, 1), (shape[-1],) * 4, torch.bfloat16)
    a = ConvArguments(x, None, weight, bias, packed, 1, False, *sides, **arguments, moments=True)
    prepared = prepare_conv(weight, bias, padding=shape[-1], height=shape[3], width=shape[4])
    expected, moments = conv2d(x, prepared, **arguments, moments=True, backend="reference")
    used = []
    for i in range(40):

        def choose(*given, i=i):
            found = config.candidates(*given)
            used.append(found[min(i, len(found) - 1)])
            return used[-1]

        launches, outputs = triton.plan_conv2d(a, choose=choose)
        for launch in launches:
            launch.run()
        assert ((outputs[0] - expected).norm() / expected.norm()).item() < 5e-3
        torch.testing.assert_close(outputs[1], moments, rtol=2e-2, atol=2e-2)
        if i and used[-1] == used[-2]:
            break
    assert len(set(used)) == len(used) - 1 > 5


@pytest.mark.skipif(ON_GPU, reason="launches with the interpreter")
def test_launches_of_triton_leave_their_tickets_at_zero():
    triton = pytest.importorskip("cmfast.kernels.triton.conv", exc_type=ImportError)
    x, weight, bias, _ = make((1, 20, 33, 9, 10, 3, 1, 1))
    packed = triton.pack(weight, torch.float32)
    sides = ((1, 1), (1, 1, 1, 1), torch.float32)
    arguments = ConvArguments(x, None, weight, bias, packed, 1, False, *sides, moments=True)
    launches, (out, moments) = triton.plan_conv2d(arguments)
    tickets = [t for a in launches for t in a.args if isinstance(t, torch.Tensor) and t.dtype == torch.int32]
    assert len(tickets) == 2
    results = []
    for _ in range(2):
        for t in (out, moments):
            t.fill_(torch.nan)
        for launch in launches:
            launch.run()
        assert not any(t.any() for t in tickets)
        results.append((out.clone(), moments.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def smaller(size, most=12):
    """A size for the interpreter of GPU kernels."""
    return size if ON_GPU else 1 + (size - 1) % (40 if size > 70 else most)


@pytest.mark.parametrize("backend", ANY)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 200),
    out=st.integers(1, 200),
    h=st.integers(1, 70),
    w=st.integers(1, 70),
    kernel=st.sampled_from([1, 2, 3, 3, 3, 5, (1, 3), (3, 2)]),
    stride=st.sampled_from([1, 1, 1, 2, 3, (2, 1)]),
    padding=st.one_of(st.integers(0, 2), st.tuples(*[st.integers(0, 2)] * 4)),
    dtype=st.sampled_from(list(DTYPES.values())),
    products=st.sampled_from(list(PRODUCTS.values())),
    layout=st.sampled_from(["c", "l"]),
    parts=st.sets(st.sampled_from(["affine", "nearest", "average"])),
    residual=st.sampled_from([None, *RESIDUALS]),
    form=st.sampled_from(list(FORMS.values())),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_drawn(
    backend, n, c, out, h, w, kernel, stride, padding, dtype, products, layout, parts, residual, form, seed, data
):
    out = min(out, max(1, 4_000_000 // (n * h * w * c)))  # the answer in float64 takes its time
    tile, transformed = form if (kernel, stride) == (3, 1) and form in CONV_FORMS[products] else (None, None)
    if backend in DIRECT and not ON_GPU and seed % 3:
        return  # a third of the cases, where launches are interpreted
    if backend in DIRECT:
        tile, transformed, c, out, h, w = None, None, *map(smaller, (c, out, h, w))
    if "nearest" in parts:
        parts -= {"average"}
    h, w = (max(s, k * (2 if "average" in parts else 1)) for s, k in zip((h, w), spread(kernel, 2), strict=True))
    pair = data.draw(st.integers(0, c - 1))
    sizes = resampled((h, w), next(iter(parts - {"affine"}), None))
    if residual == "residual_nearest" and any(s % 2 for s in outputs(sizes, kernel, stride, padding)):
        residual = "residual_average"  # only even sizes are those of an upsampled residual
    parts |= {residual} - {None}
    x, weight, bias, arguments = make((n, c, out, h, w, kernel, stride, padding), dtype, layout, seed, pair, parts)
    check(x, weight, bias, arguments, stride, padding, tile, products, backend, transformed, as_plain=False)


@pytest.mark.parametrize("backend", ANY)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 4),
    c=st.integers(1, 100),
    out=st.integers(1, 100),
    sizes=st.one_of(
        st.tuples(st.integers(1, 200)), st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
    ),
    dtype=st.sampled_from(list(DTYPES.values())),
    products=st.sampled_from(list(PRODUCTS.values())),
    layout=st.sampled_from(["c", "l"]),
    parts=st.sets(st.sampled_from(["affine", "nearest", "average"])),
    residual=st.sampled_from([None, "residual", "residual_average"]),
    form=st.sampled_from(list(FORMS.values())),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_drawn_of_audio_and_video(
    backend, n, c, out, sizes, dtype, products, layout, parts, residual, form, seed, data
):
    dims = len(sizes)
    small = st.sampled_from([(3,) * dims, (3,) * dims, (1,) * dims, (5,), (4,), (1, 3, 3), (3, 1, 1), (2, 3, 3)])
    kernel = data.draw(small.filter(lambda k: len(k) == dims))
    stride = data.draw(st.sampled_from([(1,) * dims, (1,) * dims, (2,) * dims, (3,), (2, 1, 1), (1, 2, 2)]))
    stride = stride if len(stride) == dims else (1,) * dims
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * (2 * dims)))
    if "nearest" in parts:
        parts -= {"average"}
    fewest = [
        k * (factor if "average" in parts else 1) for k, factor in zip(kernel, (1, 2, 2)[3 - dims :], strict=True)
    ]
    sizes = [*map(max, [smaller(size, 12 // dims) for size in sizes] if backend in DIRECT else sizes, fewest)]
    out = min(out, max(1, 4_000_000 // (n * c * math.prod(sizes) * math.prod(kernel))))
    winograd = kernel[-2:] == (3, 3) and stride[-2:] == (1, 1)
    tile, transformed = form if winograd and form in CONV_FORMS[products] else (None, None)
    if backend in DIRECT and not ON_GPU and seed % 3:
        return  # a third of the cases, where launches are interpreted
    if backend in DIRECT:
        tile, transformed, c, out = None, None, smaller(c), smaller(out)
    shape = (n, c, out, *sizes, kernel, stride, padding)
    parts |= {residual} - {None}
    x, weight, bias, arguments = make(shape, dtype, layout, seed, data.draw(st.integers(0, c - 1)), parts)
    check(x, weight, bias, arguments, stride, padding, tile, products, backend, transformed, as_plain=False)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("tile", [None, 1, 2])
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 50, 7, 9), (1, 8, 16, 40, 41), (5, 4, 3, 3, 2), (2, 9, 50, 5, 7, 9), (2, 4, 3, 3, 33, 20), (2, 9, 50, 99)],
)
def test_moments(shape, tile, mean, backend):
    if (len(shape) == 4 and tile == 2) or (backend in DIRECT and tile):
        pytest.skip("there is no such form")
    if backend in DIRECT and not ON_GPU and math.prod(shape[3:]) > (500 if mean else 1700):
        pytest.skip("many positions take long where launches are interpreted")
    check_output_moments(shape, tile, mean, backend, torch.float32)


CPU = [b for b in ANY if "cpu" in str(b)]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tile", "height", "width"), [(1, 3, 100), (2, 6, 64), (2, 5, 77), (4, 10, 150)])
def test_moments_of_three_rows_of_tiles(tile, height, width, products, backend):
    """So many columns of a block that parts of sixteen would not divide them, if it were filled."""
    check_output_moments((2, 9, 20, height, width), tile, 0.0, backend, products)
    x, weight, bias, _ = make((2, 9, 20, height, width, 3, 1, 1))
    prepared = prepare_conv(weight, bias, padding=1, height=height, width=width, tile=tile, dtype=products)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(conv2d(x, prepared, moments=True, backend=backend).moments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][1:], conv2d(x[1:], prepared, moments=True, backend=backend).moments)


def check_output_moments(shape, tile, mean, backend, products):
    x, weight, bias, arguments = make((*shape, 3, 1, 1), parts=("residual",))
    prepared = prepare_conv(weight, bias + mean, padding=1, **named(shape[3:]), tile=tile, dtype=products)
    y, moments = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    assert conv2d(x, prepared, **arguments, backend=backend).moments is None
    y = y.double().flatten(2)
    average = y.mean(2)
    deviation = (y - average[..., None]).square().sum(2)
    torch.testing.assert_close(moments[:, 0].double(), average, rtol=1e-6, atol=1e-6)
    # Outputs are rounded, and so are the means of the parts that they are divided into: by 3e-5 at 1000, so that the
    # squares of values of deviation 1 sum to 6e-5 more or less.
    torch.testing.assert_close(moments[:, 1].double(), deviation, rtol=6e-5 if mean else 2e-5, atol=1e-5)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("shape", [(2, 9, 50, 7, 9), (1, 8, 16, 40, 41), (2, 9, 50, 5, 7, 9), (5, 64, 64, 4, 16)])
def test_moments_of_tiles(shape, backend):
    if not has_tiles():
        pytest.skip("the instruction set has no tiles")
    check_output_moments(shape, 1, 0.0, backend, torch.bfloat16)


# N, C, Cout, H, W: samples that end within eight rows and within a part, one row, and more than a block of them
POINTWISE = [(3, 9, 50, 7, 9), (70, 20, 100, 1, 1), (1, 40, 33, 1, 5), (2, 600, 17, 20, 23), (1, 5, 48, 33, 34)]
POINTWISE += [(3, 9, 50, 67), (2, 9, 50, 3, 7, 5)]


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_moments_of_single_elements(shape, backend):
    x, weight, bias, arguments = make((*shape, 1, 1, 0), parts=("affine", "residual"))
    prepared = prepare_conv(weight, bias + 3, **named(shape[3:]))
    y, moments = conv2d(x, prepared, **arguments, moments=True, backend=backend)
    y = y.double().flatten(2)
    average = y.mean(2)
    torch.testing.assert_close(moments[:, 0].double(), average, rtol=1e-6, atol=1e-6)
    deviation = (y - average[..., None]).square().sum(2)
    torch.testing.assert_close(moments[:, 1].double(), deviation, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("rows", [*range(1, 10), 130, 1100])
@pytest.mark.parametrize("shape", ["samples", "positions"])
def test_rows_of_a_linear_layer(shape, rows, products, threads, backend):
    if backend in DIRECT and threads > 1:
        pytest.skip("its launches have no threads of the processor's")
    if backend in DIRECT and not ON_GPU and shape == "samples" and rows > 9:
        pytest.skip("each sample has programs of its own, which take long where launches are interpreted")
    n, h = (rows, 1) if shape == "samples" else (1, rows)
    outputs = 2000 if rows < 10 and backend not in DIRECT else 110  # weights enough for two threads
    x, weight, bias, arguments = make((n, 67, outputs, h, 1, 1, 1, 0), parts=("affine", "residual"))
    torch.set_num_threads(threads)
    try:
        check(x, weight, bias, arguments, 1, 0, None, products, backend, as_plain=False)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", ANY)
def test_a_group_norm_folds_into_the_next_convolution(backend):
    x, weight, bias, _ = make((2, 12, 24, 9, 10, 3, 1, 1))
    first = prepare_conv(weight, bias, padding=1, height=9, width=10)
    _, weight, bias, _ = make((2, 24, 8, 9, 10, 3, 1, 1), seed=1)
    second = prepare_conv(weight, bias, padding=1, height=9, width=10)
    rows = [torch.randn(24), torch.randn(24)]
    film = {"scale": torch.randn(2, 24), "shift": torch.randn(2, 24)}
    y, moments = conv2d(x, first, moments=True, backend=backend)
    gain, offset = fold_group_norm(moments, 90, 4, *rows, **film)
    folded = conv2d(y, second, gain=gain, offset=offset, silu=True, backend=backend).out
    apart = conv2d(group_norm(y, 4, *rows, **film, activation="silu", backend="reference"), second, backend=backend).out
    torch.testing.assert_close(folded, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ANY)
def test_prepared_weights_can_be_kept(backend):
    x, weight, bias, _ = make((1, 20, 30, 9, 9, 3, 1, 1))
    prepared = prepare_conv(weight, bias, padding=1, height=9, width=9)
    kept = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(conv2d(x, kept, backend=backend).out, conv2d(x, prepared, backend=backend).out)


@pytest.fixture
def tiles(request, monkeypatch):
    """As on a processor without tiles, or with them where a test's parameter says so."""
    found = getattr(request, "param", False)
    monkeypatch.setattr("cmfast.kernels.conv_forms.has_tiles", lambda: found)


with_tiles = pytest.mark.parametrize("tiles", [True], indirect=True, ids=["tiles"])


@pytest.mark.parametrize(
    ("channels", "size", "dtype", "form"),
    [
        (192, 64, torch.float32, (4, True)),
        (384, 8, torch.float32, (4, False)),
        (384, 2, torch.float32, (2, False)),
        (32, 8, torch.float32, (4, True)),
        (384, 8, torch.bfloat16, (2, True)),
    ],
)
def test_the_form_fits_the_size(tiles, channels, size, dtype, form):
    weight = torch.zeros(channels, channels, 3, 3)
    prepared = prepare_conv(weight, padding=1, height=size, width=size, dtype=dtype)
    assert (prepared.tile, prepared.transformed) == form


@with_tiles
@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, (4, True)), (torch.bfloat16, (1, False))], ids=str)
def test_the_form_fits_the_processor(tiles, dtype, form):
    """Operands are split where it is asked for: by the engine, of some layers."""
    prepared = prepare_conv(torch.zeros(64, 64, 3, 3), padding=1, height=16, width=16, dtype=dtype)
    assert (prepared.tile, prepared.transformed) == form


@with_tiles
def test_errors_name_the_form_of_tiles(tiles):
    with pytest.raises(ValueError, match=r"\(4, False\), \(1, True\): got \(3, True\)"):
        prepared_for(W, tile=3)


@pytest.mark.parametrize("backend", ANY)
@pytest.mark.parametrize("shape", [(0, 3, 4, 8, 8, 3, 1, 1)])
def test_no_samples(shape, backend):
    x, weight, bias, _ = make(shape)
    prepared = prepare_conv(weight, bias, padding=1, height=8, width=8)
    out, moments = conv2d(x, prepared, moments=True, backend=backend)
    assert out.shape == (0, 4, 8, 8)
    assert moments.shape == (0, 2, 4)


@pytest.mark.parametrize("backend", ANY)
def test_opcheck(backend):
    for layout in ("c", "l"):
        x, weight, bias, a = make((2, 5, 6, 7, 8, 3, 1, 1), layout=layout, parts=("affine", "residual"))
        prepared = prepare_conv(weight, bias, padding=1, height=7, width=8)
        rows = (None, a["gain"], a["offset"], True, None)
        arguments = (x, None, *prepared, *rows, a["residual"], None, True, True, backend)
        torch.library.opcheck(torch.ops.cmfast.conv2d.default, arguments)


def test_compiles_into_one_graph():
    x, weight, bias, arguments = make((2, 5, 6, 7, 8, 3, 1, 1), parts=("affine", "residual"))
    prepared = prepare_conv(weight, bias, padding=1, height=7, width=8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: conv2d(x, prepared, **arguments).out, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), conv2d(x, prepared, **arguments).out)


def test_without_packed_weights_the_reference_serves(monkeypatch):
    def missing():
        raise ImportError("not built")

    x, weight, bias, _ = make((1, 4, 4, 5, 5, 3, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(native, "cpu", missing)
        prepared = prepare_conv(weight, bias, padding=1, height=5, width=5)
        assert prepared.packed is None
    for name, reason in (("cpu", "without its kernels: prepare them here"), ("cuda", "cannot serve conv2d")):
        with pytest.raises(BackendError, match=reason):
            conv2d(x, prepared, backend=name)
        with use_backend(name), pytest.raises(BackendError, match=reason):
            conv2d(x, prepared)
    expected = F.conv2d(x, weight, bias, padding=1)
    for name in ("auto", "reference"):
        with use_backend(name):
            torch.testing.assert_close(conv2d(x, prepared).out, expected)


def prepared_for(weight, **arguments):
    return prepare_conv(weight, **{"height": 8, "width": 8, "padding": 1, **arguments})


@pytest.mark.parametrize("padding", [(1, 2), (1, 1, 2, 2)])
def test_a_number_or_two_for_each_dimension(padding):
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(4, 2, 3, 3)
    prepared = prepare_conv(weight, stride=(1, 2), padding=padding, height=8, width=8)
    assert (prepared.stride, prepared.padding) == ((1, 2), (1, 1, 2, 2))
    out = conv2d(x, prepared, backend="reference").out
    torch.testing.assert_close(out, F.conv2d(x, weight, stride=(1, 2), padding=(1, 2)))


@pytest.mark.parametrize("backend", ANY)
def test_downsampling_as_diffusers_pads_it(backend):
    x, weight, bias, _ = make((2, 20, 20, 8, 10, 3, 2, (0, 1, 0, 1)))
    prepared = prepare_conv(weight, bias, stride=2, padding=(0, 1, 0, 1), height=8, width=10)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    torch.testing.assert_close(conv2d(x, prepared, backend=backend).out, expected, rtol=1e-4, atol=1e-5)


def test_the_schema_is_that_of_the_arguments():
    schema = torch.ops.cmfast.conv2d.default._schema
    assert [argument.name for argument in schema.arguments] == [*ConvArguments._fields, "backend"]


W = torch.ones(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: prepared_for(W[0, 0]), r"weight must be .* \[3, 3\]"),
        (lambda x: prepared_for(W[0]), r"\[2, 3, 3\] are of 1 spatial dim.* must be 1, got 1 and 8"),
        (lambda x: prepared_for(W, depth=2), r"of 2 spatial dim.* must be 1, got 2 and 8"),
        (lambda x: prepared_for(W, stride=(1, 1, 1)), r"stride must be one number or 2 of them, got \(1, 1, 1\)"),
        (lambda x: prepared_for(W, padding=(1, 1, 1)), r"padding must be one number or 2 or 4 of them"),
        (lambda x: prepared_for(W, padding=(0, 1, 0, -1)), "must be positive"),
        (lambda x: prepared_for(W, stride=(1, 0)), "must be positive"),
        (lambda x: prepared_for(W[..., :2], tile=4), r"kernels of 3 x 2 .* \(1, False\): got \(4, True\)"),
        (lambda x: prepared_for(W.long()), "weight must be"),
        (lambda x: prepared_for(W, bias=torch.ones(3)), r"bias must be .* \[4\], got \[3\]"),
        (lambda x: prepared_for(W, stride=0), "must be positive"),
        (lambda x: prepared_for(W, padding=-1), "must be positive"),
        (lambda x: prepared_for(W, dtype=torch.float16), "float32 or bfloat16, or float16 on a GPU, got torch.float16"),
        (lambda x: prepared_for(W, tile=3), r"\(4, False\): got \(3, True\)"),
        (lambda x: prepared_for(W, tile=2, stride=2), r"stride 2 x 2 .* \(1, False\): got \(2, True\)"),
        (lambda x: prepared_for(W, tile=1, transformed=True), r"got \(1, True\)"),
        (
            lambda x: prepared_for(W, tile=2, transformed=False, dtype=torch.bfloat16),
            r"in torch.bfloat16 .*: got \(2, False\)",
        ),
        (lambda x: conv2d(x[0], prepared_for(W)), "x must be"),
        (lambda x: conv2d(x.long(), prepared_for(W)), "x must be"),
        (lambda x: conv2d(x[:, :, None], prepared_for(W)), r"\[N, C, H, W\].* got \[2, 2, 1, 8, 8\]"),
        (lambda x: conv2d((x, x[:1]), prepared_for(W)), "must agree"),
        (lambda x: conv2d((x, x), prepared_for(W)), "prepared for 2 channels, got 4"),
        (lambda x: conv2d((x, x), prepared_for(W), gate="relu"), "one of gelu, gelu_tanh, silu, got 'relu'"),
        (lambda x: conv2d(x, prepared_for(W), gate="gelu"), "pair .* of one shape, got no pair"),
        (lambda x: conv2d((x, x[:, :1]), prepared_for(W), gate="gelu"), r"of one shape, got .*8\] .*\[2, 1, 8, 8\]"),
        (lambda x: conv2d((x, x), prepared_for(W), gate="gelu", silu=True), "has no gain, offset or silu"),
        (lambda x: conv2d(x, prepared_for(W), gain=torch.ones(2, 2)), "give both or neither"),
        (lambda x: conv2d(x, prepared_for(W), gain=torch.ones(2), offset=torch.ones(2)), "gain must be"),
        (lambda x: conv2d(x, prepared_for(W), resample="bilinear"), 'must be None, "nearest" or "average"'),
        (lambda x: conv2d(x[..., :1], prepared_for(W, padding=0)), "does not fit"),
        (lambda x: conv2d(x[:, :, :1], prepared_for(W), resample="average"), r"does not fit .* resampled \(average"),
        (lambda x: conv2d(x, prepared_for(W), residual=x), "residual must be"),
        (lambda x: conv2d(x, prepared_for(W), residual=x, residual_resample="up"), "residual_resample must be None"),
        (lambda x: conv2d(x, prepared_for(W), residual_resample="nearest"), "there is none"),
        (
            lambda x: conv2d(x, prepared_for(W), residual=torch.ones(2, 4, 8, 8), residual_resample="average"),
            r"shape \[2, 4, 8, 8\] once resampled \(average\), got \[2, 4, 8, 8\]",
        ),
    ],
)
def test_errors(tiles, call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2, 8, 8))


def test_there_are_no_gradients():
    with pytest.raises(RuntimeError, match="serve inference"):
        conv2d(torch.ones(1, 2, 8, 8, requires_grad=True), prepared_for(W))


def test_a_sample_too_large_for_the_gpus_kernels_is_refused():
    plan_conv2d = pytest.importorskip("cmfast.kernels.triton.conv").plan_conv2d
    h = torch.empty(2, 60000, 60000, 1, device="meta").movedim(-1, 1)
    weight, packed = torch.empty(1, 1, 1, 1, device="meta"), torch.empty(1, 1, device="meta")
    a = ConvArguments(h, None, weight, None, packed, 1, False, (1, 1), (0,) * 4, torch.float32)
    with pytest.raises(BackendError, match=r"over 2\^31 elements .*\[2, 1, 60000, 60000\]"):
        plan_conv2d(a, arch="sm_90")
    assert len(plan_conv2d(a._replace(h=h[:, :, :100]), arch="sm_90")[0]) == 1


def test_auto_moves_on_from_an_image_that_is_too_large(monkeypatch):
    monkeypatch.setattr("cmfast.kernels.triton.available", lambda op, tensors: (True, ""))
    monkeypatch.delenv("CMFAST_BACKEND", raising=False)
    h, weight = torch.empty(1, 60000, 60000, 1, device="meta").movedim(-1, 1), torch.empty(1, 1, 1, 1, device="meta")
    a = ConvArguments(h, None, weight, None, None, 1, False, (1, 1), (0,) * 4, torch.float32)
    assert resolve("conv2d", [h], None, (a,)).__module__ != "cmfast.kernels.triton.conv"
    assert resolve("conv2d", [h], None, (a._replace(h=h[:, :, :100]),)).__module__ == "cmfast.kernels.triton.conv"
    with pytest.raises(BackendError, match=r"over 2\^31 elements .*\[1, 1, 60000, 60000\]"):
        resolve("conv2d", [h], "triton", (a,))


def test_samples_are_joined_as_far_as_the_gpus_kernels_can_count():
    """Convolutions of one element take all samples' positions as one image, where 32 bits count their elements."""
    plan_conv2d = pytest.importorskip("cmfast.kernels.triton.conv").plan_conv2d
    weight, packed = torch.empty(256, 256, 1, 1, device="meta"), torch.empty(256, 256, device="meta").bfloat16()
    for n, joined in ((31, True), (33, False)):
        h = torch.empty(n, 512, 512, 256, dtype=torch.bfloat16, device="meta").movedim(-1, 1)
        a = ConvArguments(h, None, weight, None, packed, 1, False, (1, 1), (0,) * 4, torch.bfloat16)
        [launch], _ = plan_conv2d(a, arch="sm_90")
        positions = launch.args[-3]
        assert positions == 512 * 512 * (n if joined else 1)


def test_an_input_made_for_the_products_is_counted_too():
    plan_conv2d = pytest.importorskip("cmfast.kernels.triton.conv").plan_conv2d
    h, skip = (torch.empty(1, 4000, 4000, 128, device="meta").movedim(-1, 1) for _ in range(2))
    weight, packed = torch.empty(1, 256, 3, 3, device="meta"), torch.empty(1, 256 * 9, device="meta")
    a = ConvArguments(h, skip, weight, None, packed, 1, False, (1, 1), (1,) * 4, torch.float32, silu=True)
    with pytest.raises(BackendError, match=r"over 2\^31 elements .*\[1, 256, 4000, 4000\]"):
        plan_conv2d(a, arch="sm_90")


@pytest.mark.parametrize("backend", ANY)
def test_a_bias_whose_numbers_do_not_follow_one_another(backend):
    x, weight, table = torch.randn(2, 32, 6, 5).bfloat16(), torch.randn(16, 32, 1, 1), torch.randn(16, 3)
    for bias in (table[:, 1], table[:1, 1].expand(16)):
        found, expected = (
            conv2d(x, prepare_conv(weight, b, height=6, width=5, dtype=torch.bfloat16), backend=backend).out
            for b in (bias, bias.contiguous())
        )
        assert torch.equal(found, expected)
