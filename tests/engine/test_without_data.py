"""What operators give of tensors without data is what torch says that they give."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map_only

from cmfast.engine import without_data

aten = torch.ops.aten
SHAPES = [(), (3,), (1,), (2, 3), (2, 1), (1, 3), (2, 3, 4, 5), (1, 3, 1, 1), (2, 1, 4, 5), (0, 3), (2, 3, 4, 5, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


def layouts(shape, dtype):
    """Contiguous, channels-last, transposed, and with gaps."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    yield x
    if len(shape) in (4, 5):
        yield x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    if len(shape) > 1:
        yield torch.empty(shape[::-1], dtype=dtype, device="meta").permute(*reversed(range(len(shape))))
        yield torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype, device="meta")[..., : shape[-1]]


def check(func, *args, **kwargs):
    """The call gives what torch gives; what torch refuses, it refuses."""
    try:
        expected = func(*args, **kwargs)
    except (RuntimeError, IndexError):
        with pytest.raises((RuntimeError, IndexError)):
            without_data.call(func, args, kwargs)
        return
    try:
        found = without_data.call(func, args, kwargs)
    except NotImplementedError:  # torch sees that only where there is data
        with pytest.raises(NotImplementedError):
            func(*tree_map_only(torch.Tensor, lambda t: torch.ones_like(t, device="cpu"), args))
        return
    assert found.is_meta
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("shape", SHAPES)
def test_operators_on_single_elements(shape):
    for dtype, func in itertools.product(DTYPES, (aten.exp, aten.sigmoid, aten.silu, aten.gelu, aten.logical_not)):
        for x in layouts(shape, dtype):
            check(func.default, x)
    for dtype, other in itertools.product(DTYPES, SHAPES):
        for x, y in itertools.product(layouts(shape, dtype), layouts(other, torch.float32)):
            check(aten.mul.Tensor, x, y)
            check(aten.add.Tensor, y, x, alpha=2)
            check(aten.gt.Tensor, x, y)
            check(aten.where.self, x > 0, x, y)
        check(aten.mul.Tensor, torch.empty(shape, dtype=dtype, device="meta"), torch.tensor(2.0))
        check(aten.pow.Tensor_Scalar, torch.empty(shape, dtype=dtype, device="meta"), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_concatenations(shape):
    for dtype, dim in itertools.product(DTYPES, range(-len(shape) - 1, len(shape) + 1)):
        for x, y in itertools.product(layouts(shape, dtype), layouts(shape, torch.bfloat16)):
            check(aten.cat.default, [x, y], dim)
    check(aten.cat.default, [torch.empty(shape, device="meta"), torch.empty((2, 4), device="meta")], 1)
    check(aten.cat.default, tensors=[torch.empty(shape, device="meta"), torch.empty((0,), device="meta")])


def test_a_concatenation_of_nothing_is_refused_by_torch():
    with pytest.raises(ValueError, match="expected a non-empty list of Tensors"):
        without_data.call(aten.cat.default, ([],), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype):
    shapes = [(2, 3), (3, 4), (4, 3), (5, 2, 3), (5, 3, 4), (1, 3, 4), (4,)]
    for shape, other in itertools.product(shapes, shapes):
        for x, y in itertools.product(layouts(shape, dtype), layouts(other, dtype)):
            check(aten.mm.default, x, y)
            check(aten.bmm.default, x, y)
            for bias in ((4,), (2, 4), (1, 1), (3,), (5, 2, 4)):
                check(aten.addmm.default, torch.empty(bias, dtype=dtype, device="meta"), x, y, beta=2)
                check(aten.baddbmm.default, torch.empty(bias, dtype=dtype, device="meta"), x, y)


def test_factors_of_two_dtypes_are_refused_as_where_there_is_data():
    x, y = torch.ones(2, 3), torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        x @ y
    with pytest.raises(RuntimeError, match=r"same dtype, got torch\.float32 and torch\.bfloat16"):
        without_data.call(aten.mm.default, (x.to("meta"), y.to("meta")), {})


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims):
    sizes = (7, 6, 5)[:dims]
    for groups, kernel, stride, padding, dilation in itertools.product((1, 2), (1, 3), (1, 2), (0, 1), (1, 2)):
        for x in layouts((2, 4, *sizes), torch.float32):
            for weight in layouts((6, 4 // groups, *[kernel] * dims), torch.float32):
                given = [[stride] * dims, [padding], [dilation] * dims, False, [0] * dims, groups]
                check(aten.convolution.default, x, weight, None, *given)
                check(aten.convolution.default, x, weight, torch.empty(6, device="meta"), *given)
    x, weight = torch.empty(2, 4, *sizes, device="meta"), torch.empty(4, 4, *[3] * dims, device="meta")
    check(aten.convolution.default, x, weight, None, [2], [1], [1], True, [1], 1)
    check(aten.convolution.default, x, weight[:, :3], None, [1], [1], [1], False, [0], 1)
    check(aten.convolution.default, x, weight, None, [1], [0], [4], False, [0], 1)


def test_what_resamples():
    for x in layouts((2, 3, 7, 8), torch.float32):
        check(aten.upsample_nearest2d.default, x, [14, 16], 2.0, 2.0)
        for given in ([[2, 2]], [[2, 2], [2, 2]], [[3, 2], [1, 2]], [[2, 2], [2, 2], [1, 1]], [[9, 9]], [[2]]):
            check(aten.avg_pool2d.default, x, *given)
    check(aten.avg_pool2d.default, torch.empty(3, 7, 8, device="meta"), [2, 2])


def test_embeddings_and_counts():
    weight, meta = torch.empty(5, 3, device="meta"), torch.device("meta")
    for dtype in (torch.int64, torch.int32):
        check(aten.embedding.default, weight, torch.empty(2, 4, dtype=dtype, device="meta"))
    check(aten.embedding.default, weight, torch.empty(2, 4, device="meta"))
    check(aten.arange.default, 7, device=meta)
    check(aten.arange.start, 2, 7, dtype=torch.float32, device=meta)
    check(aten.arange.start_step, 2.0, 7, 0.5, device=meta)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_empty_like(dtype):
    for x in [*layouts((2, 3, 7, 8), torch.float32), torch.empty(2, 1, 7, 1, device="meta")[:, :, ::2]]:
        for tensor in (x, x.permute(0, 2, 1, 3), x[:, :, 1:], x[:1].expand(4, -1, -1, -1)):
            expected, found = torch.empty_like(tensor, dtype=dtype), without_data.empty_like(tensor, dtype)
            assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
            assert found.stride() == expected.stride(), tensor.stride()


def test_empty_like_a_sparse_tensor():
    found = without_data.empty_like(torch.eye(3).to_sparse())
    assert found.is_meta
    assert found.is_sparse


def test_concatenated():
    full, empty = torch.arange(6.0).reshape(2, 3), torch.empty(4, 3, device="meta")
    assert torch.equal(without_data.concatenated([full, full]), torch.cat([full, full]))
    found = without_data.concatenated([full, empty])
    assert found.is_meta
    assert found.shape == (6, 3)


@pytest.mark.parametrize("keep_weights", [True, False])
def test_nothing_imports_torchs_compiler(keep_weights):
    code = f"""
import sys, torch, cmfast
network = cmfast.load("digits").unet
fast = cmfast.accelerate(network, dtype=torch.bfloat16, keep_weights={keep_weights})
with torch.inference_mode():
    for dtype in (torch.float32, torch.bfloat16):
        fast(torch.randn(1, 1, 8, 8, dtype=dtype), torch.full((1,), 500.0), torch.tensor([3]))
print(*(name for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
