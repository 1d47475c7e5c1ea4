import itertools

import pytest
import torch
from cmfast.kernels.layout import channels_last

from cmfast.engine.by_torch import Computed, InMemoryOrder

aten = torch.ops.aten


def draw(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def laid(x, order):
    """The same values with the dimensions in another order in memory, the last one with a gap after it."""
    wide = torch.empty(*(x.shape[d] for d in order[:-1]), 2 * x.shape[order[-1]])
    view = wide[..., : x.shape[order[-1]]].permute([order.index(d) for d in range(x.ndim)])
    return view.copy_(x)


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_softmax_lies_as_its_input_does(dim, order):
    x = draw(4, 5, 6)
    softmax = InMemoryOrder(aten._softmax.default)
    arguments = {"self": laid(x, order), "dim": dim, "half_to_float": False}
    y = softmax(**arguments)
    torch.testing.assert_close(y, x.softmax(dim))
    assert y.permute(order).is_contiguous()
    out = torch.full((6, 5, 4), torch.nan).permute(2, 1, 0)
    Computed.of(softmax)([out], arguments)
    torch.testing.assert_close(out, y)


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_concatenation_lies_as_its_largest_part_does(dim, order):
    sizes = [[4, 5, 6] for _ in range(3)]
    sizes[0][dim], sizes[2][dim] = 1, 2
    parts = [draw(*size) for size in sizes]
    cat = InMemoryOrder(aten.cat.default)
    arguments = {"tensors": [parts[0], laid(parts[1], order), parts[2]], "dim": dim}
    y = cat(**arguments)
    assert torch.equal(y, torch.cat(parts, dim))
    assert y.permute(order).is_contiguous()
    out = torch.full(y.shape, torch.nan)
    Computed.of(cat)([out], arguments)
    assert torch.equal(out, y)


def test_an_empty_part_of_a_concatenation_is_passed_over():
    x = draw(2, 3)
    assert torch.equal(InMemoryOrder(aten.cat.default)(tensors=[torch.empty(0), x, x], dim=0), torch.cat((x, x)))


def test_a_softmax_of_a_number():
    softmax, out = InMemoryOrder(aten._softmax.default), torch.tensor(torch.nan)
    Computed.of(softmax)([out], {"self": torch.tensor(3.0), "dim": 0, "half_to_float": False})
    assert out == 1


@pytest.mark.parametrize(
    ("target", "arguments", "in_place"),
    [
        (aten.add.Tensor, {"self": draw(2, 3, 4, 5), "other": draw(3, 1, 1), "alpha": 2}, True),
        (aten.pow.Tensor_Scalar, {"self": draw(2, 3, 4, 5), "exponent": 2}, True),
        (aten.gelu.default, {"self": draw(2, 3, 4, 5), "approximate": "tanh"}, True),
        (aten.bmm.default, {"self": draw(2, 3, 4), "mat2": draw(2, 4, 5).mT.contiguous().mT}, True),
        (aten.addmm.default, {"self": draw(5), "mat1": draw(3, 4), "mat2": draw(4, 5), "beta": 1, "alpha": 1}, True),
        (aten.avg_pool2d.default, {"self": draw(2, 3, 4, 6), "kernel_size": [2, 2]}, False),
        (aten.max.dim, {"self": draw(2, 3, 4, 6), "dim": 1}, False),
    ],
    ids=lambda x: str(x) if callable(x) else "",
)
def test_results_go_where_they_are_expected(target, arguments, in_place):
    expected = target(**arguments)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    computed = Computed.of(target)
    assert (computed.variant is not None) == in_place
    outs = [channels_last(e) if e.ndim == 4 else torch.empty_like(e.mT).mT for e in expected]
    for out in outs:
        out.fill_(7)
    places = [(out.data_ptr(), out.stride()) for out in outs]
    computed(outs, arguments)
    assert places == [(out.data_ptr(), out.stride()) for out in outs]
    for out, e in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, e)


def test_operators_stay_the_ones_they_were():
    """torch makes another object of an overload that is asked for in another way; passes compare them."""
    before = aten.mul.Tensor
    Computed.of(aten.mul.Tensor)
    assert aten.mul.Tensor is before
