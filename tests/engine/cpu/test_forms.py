from types import SimpleNamespace

import pytest
import torch
from cmfast.kernels import conv_forms
from cmfast.kernels.conv_forms import SPLIT
from cmfast.kernels.conv_forms import ConvForm as Form
from torch import nn

from cmfast.engine import capture
from cmfast.engine.cpu import forms
from cmfast.engine.cpu.forms import candidates, choose
from cmfast.engine.graph import CONV
from cmfast.engine.passes import PASSES

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def tiles(request, monkeypatch):
    """As on a processor that has products of bfloat16; by tiles where a test's parameter says so."""
    found = getattr(request, "param", False)
    monkeypatch.setattr(forms, "multiplies", lambda products: True)
    for module in (forms, conv_forms):
        monkeypatch.setattr(module, "has_tiles", lambda: found)


def call(sizes, in_channels=64, out_channels=64, **options):
    """The conv2d call of a network of one convolution, on an image of these sizes."""
    kernel = options.pop("kernel", 3)
    net = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **options).eval()
    graph = capture(net, [torch.zeros(1, in_channels, *sizes)])
    PASSES["convolutions"](graph)
    (node,) = graph.calls(CONV)
    return node


@pytest.mark.parametrize(
    ("sizes", "products", "tile"),
    [
        ((4, 4), F32, 2),  # 16 outputs: 4 tiles of 4 would serve 64
        ((17, 1), F32, 4),
        ((64, 64), F32, 4),
        ((16, 16), BF16, 4),
        ((17, 15), BF16, 2),  # 255 outputs
        ((4, 4), BF16, 2),
    ],
    ids=str,
)
def test_tiles(sizes, products, tile):
    form = choose(call(sizes), products)
    assert (form.tile, form.dtype) == (tile, products)


@pytest.mark.parametrize(
    ("sizes", "channels", "transformed"),
    [((16, 16), 256, True), ((16, 16), 257, False), ((257, 1), 257, True), ((1, 255), 257, False)],
    ids=str,
)
def test_large_weights_of_few_outputs_are_transformed_as_they_are_used(sizes, channels, transformed):
    node = call(sizes, channels, 256)
    assert choose(node, F32).transformed == transformed
    assert choose(node, BF16).transformed  # in bfloat16 there is no other way


@pytest.mark.parametrize(
    ("channels", "dtype"), [((15, 64), F32), ((64, 15), F32), ((16, 64), BF16), ((64, 16), BF16)], ids=str
)
def test_few_channels_stay_in_float32(channels, dtype):
    assert choose(call((8, 8), *channels), BF16).dtype == dtype
    assert choose(call((8, 8), *channels), F32).dtype == F32


@pytest.mark.parametrize("tiles", [True], indirect=True)
@pytest.mark.parametrize(
    ("channels", "dtype"), [((64, 3), BF16), ((16, 1), BF16), ((3, 64), F32), ((15, 64), F32)], ids=str
)
def test_tiles_multiply_few_outputs(tiles, channels, dtype):
    assert choose(call((64, 64), *channels), BF16).dtype == dtype


@pytest.mark.parametrize("options", [{"kernel": 1}, {"kernel": 5}, {"stride": 2}], ids=str)
@pytest.mark.parametrize("products", [F32, BF16])
def test_winograd_is_for_three_by_three_at_stride_one(options, products):
    node = call((16, 16), **options)
    assert choose(node, products) == Form(1, False, products)
    assert candidates(node, products) == [Form(1, False, products)]


@pytest.mark.parametrize(
    ("sizes", "products", "forms"),
    [
        ((4, 4), F32, {(2, True), (2, False), (4, True), (4, False)}),
        ((16, 16), F32, {(2, True), (2, False), (4, True), (4, False)}),
        ((16, 16), BF16, {(2, True), (4, True)}),
        ((15, 15), BF16, {(2, True)}),  # larger tiles would cost accuracy
    ],
    ids=str,
)
def test_candidates_are_accurate_enough(sizes, products, forms):
    found = candidates(call(sizes), products)
    assert {(form.tile, form.transformed) for form in found} <= forms
    assert {form.tile for form in found} == {tile for tile, _ in forms}
    assert choose(call(sizes), products) in found
    assert all(form.dtype == products for form in found)


@pytest.mark.parametrize(
    ("sizes", "kernel", "dtype"),
    [((1, 8), 1, BF16), ((1, 9), 1, F32), ((2, 4), 3, BF16), ((3, 3), 3, F32), ((64, 64), 3, F32)],
    ids=str,
)
def test_without_products_of_bfloat16_it_is_for_few_rows(sizes, kernel, dtype, monkeypatch):
    monkeypatch.setattr(forms, "multiplies", lambda products: products == F32)
    node = call(sizes, kernel=kernel)
    assert choose(node, BF16).dtype == dtype
    assert all(form.dtype == dtype for form in candidates(node, BF16))
    assert choose(node, F32).dtype == F32
    assert forms.attention_products(BF16) == F32


@pytest.mark.parametrize(
    ("isa", "has"), [("amx", True), ("avx512bf16", True), ("avx512", False), ("avx2", False), ("portable", False)]
)
def test_instruction_sets_with_products_of_bfloat16(isa, has, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(forms.native, "cpu", lambda: SimpleNamespace(build_info=lambda: {"isa": isa}))
    assert forms.multiplies(BF16) == has
    assert forms.multiplies(F32)
    assert forms.attention_products(BF16) == (BF16 if has else F32)


def test_names_of_forms():
    assert str(Form(1, False, F32)) == "direct, float32"
    assert str(Form(4, True, BF16)) == "F(4x4), bfloat16"
    assert str(Form(2, False, F32)) == "F(2x2), transformed at use, float32"


with_tiles = pytest.mark.parametrize("tiles", [True], indirect=True, ids=["tiles"])


@with_tiles
@pytest.mark.parametrize("options", [{}, {"kernel": 1}, {"kernel": 5}, {"stride": 2}], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4), (64, 64)], ids=str)
def test_tiles_multiply_bfloat16_in_the_direct_form(tiles, options, sizes):
    node = call(sizes, **options)
    assert choose(node, BF16) == Form(1, False, BF16)
    assert candidates(node, BF16) == [Form(1, False, BF16)]


@with_tiles
@pytest.mark.parametrize(
    ("sizes", "channels", "kernel", "given", "form"),
    [
        ((32, 32), (128, 128), 3, {"gain": "a row"}, SPLIT),
        ((16, 16), (128, 128), 3, {"residual": "an image"}, Form(4, True, F32)),  # is added to what is passed on
        ((16, 16), (128, 128), 3, {}, Form(4, True, F32)),  # passes on what it reads
        ((33, 32), (128, 128), 3, {"gain": "a row"}, Form(4, True, F32)),
        ((16, 16), (112, 128), 3, {"gain": "a row"}, Form(4, True, F32)),  # may be one of few layers
        ((64, 64), (512, 256), 1, {"gain": "a row"}, SPLIT),
        ((64, 64), (512, 256), 1, {}, Form(1, False, F32)),
        ((3, 5), (512, 256), 1, {"gain": "a row"}, Form(1, False, F32)),  # the rows of a tile would be those of samples
    ],
    ids=str,
)
def test_tiles_multiply_float32_of_branches_in_split_operands(tiles, sizes, channels, kernel, given, form):
    node = call(sizes, *channels, kernel=kernel)
    names = [a.name for a in CONV._schema.arguments]
    node.args = tuple(given.get(name, value) for name, value in zip(names, node.args, strict=False))
    node.kwargs = {**node.kwargs, **{name: value for name, value in given.items() if name in node.kwargs}}
    assert choose(node, F32) == form
    assert form in candidates(node, F32)
