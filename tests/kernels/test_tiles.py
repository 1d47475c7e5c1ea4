"""Tensors as tiles [N, C, P], and what becomes of those that no strides can view so."""

import pytest
import torch
from cmfast.kernels import channel_moments, group_norm
from cmfast.kernels.layout import positions_adjoin
from cmfast.kernels.tiles import make_operand
from hypothesis import given, settings
from hypothesis import strategies as st

from .backends import served


@st.composite
def views(draw, shape):
    """A tensor of `shape` whose dimensions lie in any order, some of them expanded, others of every second element."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([0, 1, 1, 1, 2])) for _ in shape]
    sizes = [size * step if step else 1 for size, step in zip(shape, steps, strict=True)]
    dense = torch.randn([sizes[d] for d in order], generator=torch.Generator().manual_seed(len(shape)))
    x = dense.permute([order.index(d) for d in range(len(shape))])
    return x[tuple(slice(None, None, step or 1) for step in steps)].expand(shape)


shapes = st.lists(st.integers(1, 4), min_size=3, max_size=5)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_an_operand_reads_each_element(data):
    shape = data.draw(shapes)
    x, like = data.draw(views(shape)), data.draw(views(shape))
    like = like if positions_adjoin(like) else torch.empty(shape)
    operand = make_operand(x, like)
    order = sorted(range(2, len(shape)), key=like.stride, reverse=True)
    read = operand.tensor.as_strided(x.flatten(2).shape, operand.strides, operand.tensor.storage_offset())
    assert torch.equal(read, x.permute(0, 1, *order).reshape(read.shape))


@pytest.mark.parametrize("backend", served("channel_moments"))
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_moments_of_any_view(backend, data):
    x = data.draw(views(data.draw(shapes)))
    expected = channel_moments(x, backend="reference")
    torch.testing.assert_close(channel_moments(x, backend=backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", served("group_norm"))
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_group_norm_of_any_view(backend, data):
    shape = data.draw(shapes)
    x, skip = data.draw(views(shape)), data.draw(views(shape))
    expected = group_norm((x, skip), 2, activation="silu", backend="reference")
    torch.testing.assert_close(group_norm((x, skip), 2, activation="silu", backend=backend), expected)
