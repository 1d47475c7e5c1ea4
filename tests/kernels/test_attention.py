import contextlib
import dataclasses
import functools
import importlib
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from cmfast.kernels import BackendError, attention, native, split_qkv
from cmfast.kernels.layout import empty_in_order
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from .backends import served
from .plain import rounded_attention, worse
from .tolerance import assert_as_accurate, error

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# N, H, T, S, D: whole tiles, one more and one less, text of 77 tokens, head sizes that are no powers of two, one query
SHAPES = {
    "N1-H1-T64-S64-D64": (1, 1, 64, 64, 64),
    "N1-H1-T65-S63-D32": (1, 1, 65, 63, 32),
    "N1-H2-T30-S77-D40": (1, 2, 30, 77, 40),
    "N1-H1-T33-S100-D128": (1, 1, 33, 100, 128),
    "N2-H2-T5-S2-D16": (2, 2, 5, 2, 16),
    "N2-H2-T1-S9-D17": (2, 2, 1, 9, 17),
    "N1-H3-T16-S24-D72": (1, 3, 16, 24, 72),
    "N1-H1-T7-S7-D100": (1, 1, 7, 7, 100),
}


def framed(values: Tensor, frame: int) -> Tensor:
    """The same values inside a buffer of NaN: a lane that reads beyond its tensor shows."""
    n, rows, columns = values.shape
    buffer = torch.full((n + 2, rows + frame, columns + frame), torch.nan, dtype=values.dtype)
    return buffer[1:-1, :rows, :columns].copy_(values)


def make(shape, dtype, packing="ntc", order="3hd", frame=16, seed=0, amount=1.0):
    """Views q, k, v of packed projections, and a gradient that lies as q does."""
    n, h, t, s, d = shape
    g = torch.Generator().manual_seed(seed)

    def packed(positions):
        values = (torch.randn(n, positions, 3 * h * d, generator=g) * amount).to(dtype)
        if packing == "ntc":
            return split_qkv(framed(values, frame), h, order, channels_dim=2)
        return split_qkv(framed(values.transpose(1, 2), frame), h, order, channels_dim=1)

    q, _, grad = packed(t)
    _, k, v = packed(s)
    return q, k, v, grad


def order(x):
    """The strides that count."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def assert_logsumexp(actual, exact, products, backend):
    """As float32 has it; by tiles, weights are computed to 2⁻¹⁸ and then rounded to bfloat16."""
    by_tiles = backend == "cpu" and products == torch.bfloat16 and native.cpu().build_info()["isa"] == "amx"
    torch.testing.assert_close(actual, exact.float(), rtol=5e-7, atol=4e-6 if by_tiles else 1e-6)


def check(q, k, v, backend, scale=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    exact = torch.ops.cmfast.attention(q.double(), k.double(), v.double(), scale, "reference")
    plain = worse(exact[0], *(rounded_attention(q, k, v, scale, scale_first=first)[0] for first in (False, True)))
    actual = torch.ops.cmfast.attention(q, k, v, scale, backend)
    assert order(actual[0]) == order(empty_in_order(q, q.shape))
    assert_as_accurate("out", actual[0], exact[0], plain)
    assert_logsumexp(actual[1], exact[1], q.dtype, backend)


def check_gradients(grad, q, k, v, backend, scale=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    exact, plain = exact_gradients(grad, q, k, v, scale), plain_gradients(grad, q, k, v, scale)
    few = q.numel() + k.numel() < 512
    others = [
        [
            max(error(p, e) for p in ways)
            for e, ways in zip(exact_gradients(*x, scale), plain_gradients(*x, scale), strict=True)
        ]
        for x in (nearby((grad, q, k, v)) if few else ())
    ]
    out, lse = torch.ops.cmfast.attention(q, k, v, scale, backend)
    actual = torch.ops.cmfast.attention_backward(grad, q, k, v, out, lse, scale, backend)
    for i, (name, x, a, e, p) in enumerate(zip(("dq", "dk", "dv"), (q, k, v), actual, exact, plain, strict=True)):
        assert order(a) == order(empty_in_order(x, x.shape))
        assert_as_accurate(name, a, e, worse(e, *p), max((errors[i] for errors in others), default=0.0))


def exact_gradients(grad, q, k, v, scale):
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(torch.softmax(leaves[0] @ leaves[1].mT * scale, 3) @ leaves[2], leaves, grad.double())


def plain_gradients(grad, q, k, v, scale):
    """Each gradient in two ways."""
    return [*zip(*(rounded_attention(q, k, v, scale, grad, first) for first in (False, True)), strict=True)]


def nearby(tensors):
    """Tensors a little different, on which the plain formula's rounding falls differently: of few, one may be lucky."""
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield [x + (2.0**-10 * torch.randn(x.shape, generator=g)).to(x.dtype) * x for x in tensors]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_definition_is_torchs(scale):
    q, k, v, _ = make((2, 3, 5, 7, 16), torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(attention(q, k, v, scale=scale, backend="reference"), expected)
    lse = torch.ops.cmfast.attention(q, k, v, scale or 0.25, "reference")[1]
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT * (scale or 0.25), 3))


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_of_0(dtype, backend):
    """All keys weigh the same."""
    q, k, v, _ = make((1, 2, 5, 40, 32), dtype)
    check(q, k, v, backend, scale=0.0)


_AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys
import torch
from cmfast.kernels import attention, native

assert native.cpu().set_isa(sys.argv[1]) == ""
page = mmap.PAGESIZE
for size in (16, 48, 64, 80):
    memory = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + 2 * page), page, 0) == 0
    count = 8 * size
    q = torch.frombuffer(memory, dtype=torch.bfloat16, count=count, offset=2 * page - 2 * count).view(1, 1, 8, size)
    q.copy_(torch.randn(1, 1, 8, size))
    assert torch.isfinite(attention(q, q, q, backend="cpu")).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="its memory is protected by Linux's means")
@pytest.mark.parametrize("isa", native.cpu().build_info()["isas"].split(", "))
def test_nothing_beyond_the_queries_is_read(isa):
    """The next page may not be there: a framed tensor's neighbours only show what is taken into account."""
    subprocess.run([sys.executable, "-c", _AT_THE_END_OF_MEMORY, isa], check=True)


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("packing", ["ntc", "nct"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, packing, backend):
    q, k, v, _ = make(shape, dtype, packing, frame=16 if shape[2] % 2 else 5)
    check(q, k, v, backend)


@pytest.mark.parametrize("backend", [parameter for parameter in served("attention") if parameter.values[0] == "cpu"])
@pytest.mark.parametrize("packing", ["ntc", "nct"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_of_bfloat16(shape, dtype, packing, backend):
    from cmfast.kernels.cpu import attention as attend

    q, k, v, _ = make(shape, dtype, packing, "h3d", frame=5)
    scale = 1 / math.sqrt(shape[4])
    actual = attend(q, k, v, scale, torch.bfloat16)
    exact = torch.ops.cmfast.attention(q.double(), k.double(), v.double(), scale, "reference")[0]
    narrow = [x.bfloat16() for x in (q, k, v)]
    plain = worse(exact, *(rounded_attention(*narrow, scale, scale_first=first)[0] for first in (False, True)))
    assert_as_accurate("out", actual[0], exact, plain.to(dtype))
    lse = torch.ops.cmfast.attention(*(x.double() for x in narrow), scale, "reference")[1]
    assert_logsumexp(actual[1], lse, torch.bfloat16, backend)


def test_products_of_another_dtype_are_refused():
    from cmfast.kernels.cpu import attention as attend

    with pytest.raises(ValueError, match="products must be None, float32 or bfloat16, got"):
        attend(*torch.randn(3, 1, 1, 2, 16), 1.0, torch.float16)


@pytest.mark.parametrize("backend", served("attention_backward"))
@pytest.mark.parametrize("packing", ["ntc", "nct"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients(shape, dtype, packing, backend):
    q, k, v, grad = make(shape, dtype, packing, frame=16 if shape[2] % 2 else 5)
    check_gradients(grad, q, k, v, backend)


drawn = functools.partial(
    given,
    n=st.integers(1, 2),
    h=st.integers(1, 2),
    t=st.integers(1, 34),
    s=st.integers(2, 34),
    d=st.integers(16, 128),
    dtype=st.sampled_from(list(DTYPES.values())),
    packing=st.sampled_from(["ntc", "nct"]),
    order=st.sampled_from(["3hd", "h3d"]),
    frame=st.sampled_from([0, 3, 8]),
    seed=st.integers(0, 100),
)


@pytest.mark.parametrize("backend", served("attention"))
@settings(max_examples=12, deadline=None, derandomize=True)
@drawn()
def test_drawn(backend, n, h, t, s, d, dtype, packing, order, frame, seed):
    q, k, v, _ = make((n, h, t, s, d), dtype, packing, order, frame, seed)
    check(q, k, v, backend)


@pytest.mark.parametrize("backend", served("attention_backward"))
@settings(max_examples=10, deadline=None, derandomize=True)
@drawn()
def test_gradients_drawn(backend, n, h, t, s, d, dtype, packing, order, frame, seed):
    q, k, v, grad = make((n, h, t, s, d), dtype, packing, order, frame, seed)
    check_gradients(grad, q, k, v, backend)


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.7])
def test_any_scale(scale, backend):
    q, k, v, grad = make((1, 2, 20, 37, 24), torch.float32)
    check(q, k, v, backend, scale)
    check_gradients(grad, q, k, v, backend, scale)


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("offset", [-300.0, 300.0])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in lanes that are then masked or not stored
def test_scores_far_from_zero(offset, backend):
    q, k, v, grad = make((1, 1, 20, 37, 16), torch.float32, amount=0.1)
    q, k = q + 1, k + offset / 16
    check(q, k, v, backend, 1.0)
    check_gradients(grad, q, k, v, backend, 1.0)


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in lanes that are then masked or not stored
def test_keys_beside_which_all_before_weigh_nothing(dtype, backend):
    """The largest score rises by more than float32's exponents span, from block to block of keys."""
    q, k, v, _ = make((1, 1, 9, 1300, 16), dtype)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, :640, 0], k[:, :, 1200:, 0] = -300.0, 300.0
    check(q, k, v, backend)


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("key", [0, 5, 19, 76])
def test_nan_of_a_key_reaches_every_query(key, backend):
    q, k, v, _ = make((1, 2, 9, 77, 16), torch.float32)
    k[:, 0, key, 3] = torch.nan
    out = attention(q, k, v, backend=backend)
    assert out[:, 0].isnan().all()
    assert not out[:, 1].isnan().any()


@pytest.mark.parametrize("backend", served("attention"))
def test_a_later_tile_has_the_highest_score(backend):
    q, k, v, grad = make((1, 1, 8, 130, 16), torch.float32)
    k = k * torch.linspace(0.1, 5, 130)[:, None]
    check(q, k, v, backend)
    check_gradients(grad, q, k, v, backend)


@pytest.mark.parametrize("backend", served("attention"))
def test_every_tensor_has_its_own_order(backend):
    q, _, v, _ = make((2, 2, 19, 19, 32), torch.float32, "nct")
    _, k, _, grad = make((2, 2, 19, 19, 32), torch.float32, "ntc", seed=1)
    check(q.contiguous(), k, v, backend)
    check_gradients(grad, q, k, v, backend)
    check_gradients(grad[:1, :1, :1, :1].expand(2, 2, 19, 32), k, q, v, backend)


@pytest.mark.parametrize("backend", served("attention"))
def test_heads_may_share_keys(backend):
    q, k, v, grad = make((2, 3, 9, 12, 16), torch.float32)
    k, v = (x[:, :1].expand(2, 3, 12, 16) for x in (k, v))
    check(q, k, v, backend)
    check_gradients(grad, q, k, v, backend)


@pytest.mark.parametrize("backend", served("attention"))
def test_no_queries(backend):
    q, k, v = torch.randn(1, 2, 0, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    out, lse = torch.ops.cmfast.attention(q, k, v, 0.25, backend)
    assert out.shape == (1, 2, 0, 16)
    dq, dk, dv = torch.ops.cmfast.attention_backward(out, q, k, v, out, lse, 0.25, backend)
    assert dq.shape == q.shape
    assert not dk.any()
    assert not dv.any()


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_key(dtype, backend):
    q, k, v, grad = make((2, 2, 5, 1, 16), dtype, "nct")
    out, lse = torch.ops.cmfast.attention(q, k, v, 0.25, backend)
    assert torch.equal(out, v.expand(2, 2, 5, 16))
    dq, dk, dv = torch.ops.cmfast.attention_backward(grad, q, k, v, out, lse, 0.25, backend)
    torch.testing.assert_close(dv, grad.float().sum(2, keepdim=True).to(dtype))
    for name, gradient in (("dq", dq), ("dk", dk)):  # the weight of the only key does not change
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", served("attention"))
def test_two_runs_agree_to_the_bit(backend):
    q, k, v, grad = make((1, 1, 70, 70, 32), torch.float16)
    first, second = (torch.ops.cmfast.attention(q, k, v, 0.2, backend) for _ in range(2))
    assert all(map(torch.equal, first, second))
    first, second = (torch.ops.cmfast.attention_backward(grad, q, k, v, *first, 0.2, backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


GUARD = 64


@contextlib.contextmanager
def guarded_outputs(backend):
    """Give the backend's outputs guards in memory, which must be whole at the end; the list of the outputs."""
    module = importlib.import_module(f"cmfast.kernels.{backend}.attention")
    outputs = []

    def empty_inside(like, shape, dtype=None):
        dense = empty_in_order(like, shape, dtype)
        outputs.append(torch.full((dense.numel() + 2 * GUARD,), 3.0, dtype=dense.dtype, device=dense.device))
        return outputs[-1].as_strided(dense.shape, dense.stride(), GUARD)

    with mock.patch.object(module, "empty_in_order", empty_inside):
        yield outputs
    for memory in outputs:
        assert (memory[:GUARD] == 3.0).all()
        assert (memory[-GUARD:] == 3.0).all()


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", ["ntc", "nct"])
@pytest.mark.parametrize("positions", [40, 37])
def test_writes_nothing_else(positions, packing, dtype, backend):
    if backend == "reference":
        pytest.skip("torch's own operators write where torch says")
    q, k, v, grad = make((1, 2, positions, positions, 24), dtype, packing)
    with guarded_outputs(backend) as outputs:
        check(q, k, v, backend)
        check_gradients(grad, q, k, v, backend)
    assert len(outputs) == 5


@pytest.mark.parametrize("order", ["3hd", "h3d"])
def test_split_qkv_shares_memory_and_heads_fold_back(order):
    n, t, h, d = 2, 5, 3, 16
    for channels_dim, shape in ((2, (n, t, 3 * h * d)), (1, (n, 3 * h * d, t))):
        packed = torch.randn(shape)
        parts = split_qkv(packed, h, order, channels_dim)
        assert split_qkv(packed, h, order)[1].stride() == parts[1].stride()
        for i, part in enumerate(parts):
            assert part.shape == (n, h, t, d)
            assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
            for head in range(h):
                first = d * (i * h + head if order == "3hd" else head * 3 + i)
                expected = packed.narrow(channels_dim, first, d)
                assert torch.equal(part[:, head], expected if channels_dim == 2 else expected.mT)
        out = attention(*parts, backend="reference")
        folded = out.transpose(1, 2).flatten(2) if channels_dim == 2 else out.mT.flatten(1, 2)
        assert folded.data_ptr() == out.data_ptr()
        assert folded.is_contiguous()


def test_split_qkv_takes_the_dimension_it_is_told():
    packed = torch.randn(1, 12, 24)
    assert split_qkv(packed, 2)[0].shape == (1, 2, 24, 2)
    assert split_qkv(packed, 2, channels_dim=2)[0].shape == (1, 2, 12, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: attention(x[0], x, x), "expected q"),
        (lambda x: attention(x, x, x[:, :, :2]), "expected q"),
        (lambda x: attention(x, x[:, :1], x[:, :1]), "expected q"),
        (lambda x: attention(x, x[..., :8], x[..., :8]), "expected q"),
        (lambda x: attention(x, x.half(), x), "share a floating dtype"),
        (lambda x: attention(x.long(), x.long(), x.long()), "share a floating dtype"),
        (lambda x: attention(x, x[:, :, :0], x[:, :, :0]), "at least one position"),
        (lambda x: split_qkv(x[0], 2, "hd3"), "layout must be"),
        (lambda x: split_qkv(x, 2), "expected qkv"),
        (lambda x: split_qkv(x[0], 0), "at least one head"),
        (lambda x: split_qkv(x[0], 2, channels_dim=0), "channels_dim"),
        (lambda x: split_qkv(x[0], 5, channels_dim=1), "must divide the channels"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2, 3, 16))


@pytest.mark.parametrize("backend", served("attention")[:1])
@pytest.mark.parametrize("head_dim", [8, 160])
def test_refuses_other_head_sizes(head_dim, backend):
    x = torch.randn(1, 1, 4, head_dim)
    with pytest.raises(BackendError, match=f"head size is {head_dim}"):
        attention(x, x, x, backend=backend)
    torch.testing.assert_close(attention(x, x, x), F.scaled_dot_product_attention(x, x, x))


def test_gradcheck():
    leaves = [x.detach().requires_grad_() for x in make((1, 2, 3, 4, 5), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, backend="reference"), leaves)


@pytest.mark.parametrize("backend", served("attention"))
@pytest.mark.parametrize("packing", ["ntc", "nct"])
def test_opcheck(packing, backend):
    q, k, v, grad = make((1, 1, 6, 5, 16), torch.float32, packing)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.cmfast.attention.default, (q.detach(), k.detach(), v.detach(), 0.25, backend))
    out, lse = torch.ops.cmfast.attention(q, k, v, 0.25, backend)
    args = (grad, q.detach(), k.detach(), v.detach(), out.detach(), lse.detach(), 0.25, backend)
    torch.library.opcheck(torch.ops.cmfast.attention_backward.default, args)


@pytest.mark.parametrize("backend", served("attention"))
def test_compiles_into_one_graph(backend):
    q, k, v, _ = make((1, 2, 6, 5, 16), torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    eager = functools.partial(attention, backend=backend)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), eager(*leaves))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), eager(*leaves))
    expected = torch.autograd.grad(eager(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


class TestTriton:
    """Planning and tiles, which need no GPU."""

    @pytest.fixture(autouse=True)
    def _needs_triton(self):
        pytest.importorskip("triton")

    def test_plans_without_memory(self):
        from cmfast.kernels.triton.attention import plan_attention, plan_attention_backward

        q, k, v = split_qkv(torch.empty(2, 3 * 6 * 64, 1024, dtype=torch.bfloat16, device="meta"), 6)
        launches, (out, lse) = plan_attention(q, k, v, 0.125, "sm_90")
        assert [launch.grid for launch in launches] == [(2 * 6 * 16,)]
        assert (out.stride(), lse.shape) == ((6 * 64 * 1024, 64 * 1024, 1, 1024), (2, 6, 1024))
        launches, gradients = plan_attention_backward(out, q, k, v, out, lse, 0.125, "sm_90")
        assert [launch.grid for launch in launches] == [(2 * 6 * 16,)] * 2
        assert all(g.is_meta and g.shape == q.shape for g in gradients)

    def test_plans_for_a_gpu_that_is_not_there(self):
        from cmfast.kernels.triton.attention import plan_attention

        with FakeTensorMode():
            q = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.float16)
            out, lse = torch.ops.cmfast.attention(q, q, q, 0.125, None)
            planned = plan_attention(q, q, q, 0.125)[1]
        for a, p in zip((out, lse), planned, strict=True):
            assert (a.device.type, a.shape, a.stride(), a.dtype) == (p.device.type, p.shape, p.stride(), p.dtype)

    @pytest.mark.parametrize("arch", ["", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    @pytest.mark.parametrize("unit", [1, 16])
    def test_the_table_serves_every_head_size(self, unit, dtype, arch):
        from cmfast.kernels.triton.attention_config import configuration

        for kernel in ("forward", "dq", "dkdv"):
            for head_dim in range(16, 129):
                q = torch.empty(1, 1, 64, head_dim, dtype=dtype, device="meta")
                config = configuration(kernel, q, arch, unit)
                assert config.block_t >= 16
                assert config.block_s >= 16
        with pytest.raises(ValueError, match="no tiles for forward at head size 129"):
            configuration("forward", torch.empty(1, 1, 1, 129, dtype=dtype), arch, unit)

    def test_long_sequences_have_larger_tiles(self):
        from cmfast.kernels.triton.attention import plan_attention

        q = torch.empty(1, 1, 4096, 64, dtype=torch.bfloat16, device="meta")
        assert plan_attention(q, q, q, 1.0, "sm_90")[0][0].grid == (32,)

    def test_vectors_need_aligned_rows(self):
        from cmfast.kernels.triton.attention import plan_attention

        def units(t, d):
            q, k, v = split_qkv(torch.empty(1, 3 * d, t, device="meta"), 1, channels_dim=1)
            ntc = torch.empty(1, t, 3 * d, device="meta")
            return [
                plan_attention(*x, 1.0)[0][0].constants["T_UNIT"]
                for x in ((q, k, v), split_qkv(ntc, 1, channels_dim=2))
            ]

        assert units(1024, 64) == [16, 16]
        assert units(1000, 40) == [8, 8]
        assert units(77, 64) == [1, 16]
        assert units(64, 17) == [16, 1]

    def test_autotune_measures_once_and_remembers(self, monkeypatch, tmp_path):
        from cmfast.kernels.triton import attention_config

        q, k, v, _ = make((1, 1, 8, 8, 16), torch.float16)
        measured = []

        def milliseconds(launch):
            measured.append(launch)
            return abs(launch.constants["BLOCK_T"] - 16) + launch.constants["BLOCK_S"]

        monkeypatch.setenv("CMFAST_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(attention_config, "_milliseconds", milliseconds)
        monkeypatch.setattr(attention_config, "_can_measure", lambda q: True)
        monkeypatch.setattr(attention_config, "_device_name", lambda device: "a GPU")
        attention_config._load.cache_clear()
        attention(q, k, v, backend="triton")
        assert not measured  # only where it is asked for
        monkeypatch.setenv("CMFAST_AUTOTUNE", "1")
        attention(q, k, v, backend="triton")
        candidates = len(measured)
        assert candidates > 1
        attention(q, k, v, backend="triton")
        attention_config._load.cache_clear()  # another process reads the file
        attention(q, k, v, backend="triton")
        assert len(measured) == candidates
        fastest = min(measured, key=lambda x: abs(x.constants["BLOCK_T"] - 16) + x.constants["BLOCK_S"])
        config = attention_config.tuned("forward", q, k, None)
        assert dataclasses.astuple(config)[:2] == (fastest.constants["BLOCK_T"], fastest.constants["BLOCK_S"])

    def test_autotune_needs_no_folder_to_write(self, monkeypatch, tmp_path):
        from cmfast.kernels.triton import attention_config

        (tmp_path / "file").write_text("")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / attention_config.FILE_NAME).write_text("not json")
        attention_config._load.cache_clear()
        assert attention_config._load(tmp_path / "cache") == {}
        attention_config._save(tmp_path / "file" / "folder", {})
