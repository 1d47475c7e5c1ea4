"""What only the CUDA group norm has: clusters of blocks, and launchers that check what they are given."""

import contextlib
import math
import sys
from unittest import mock

import pytest
import torch
from cmfast.kernels import native
from cmfast.kernels.tiles import Operand

from . import emulation
from .backends import ON_GPU
from .memory import GUARD
from .test_group_norm import DTYPES, LARGE_SHAPES, PARTS, SHAPES, check, check_gradients, make

pytestmark = pytest.mark.skipif(ON_GPU or bool(emulation.missing()), reason=emulation.missing() or "for the emulation")
schedules = pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=pytest.mark.schedule(s)) for s in emulation.SCHEDULES]
)


def _module():
    return sys.modules["cmfast.kernels.cuda.group_norm"]


@schedules
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "groups", "pair"), LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_clusters(shape, groups, pair, dtype, layout, seed):
    x, arguments = make(shape, dtype, PARTS, layout=layout, pair=pair)
    with native.planning(90):
        check(x, groups, arguments, "silu", "cuda")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_clusters_give_the_statistics(layout):
    x, _ = make((1, 64, 40, 40), torch.float32, (), layout=layout)
    arguments = (x + 1000, None, 4, None, None, 1e-5, None, None, None, False)
    _, mean, rstd = torch.ops.cmfast.group_norm(*arguments, "reference")
    with native.planning(90):
        _, actual_mean, actual_rstd = torch.ops.cmfast.group_norm(*arguments, "cuda")
    torch.testing.assert_close(actual_mean, mean)
    torch.testing.assert_close(actual_rstd, rstd, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [80, 90])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES.values(), *(case[:2] for case in LARGE_SHAPES.values())])
def test_writes_nothing_else(shape, groups, layout, value):
    x, arguments = make(shape, torch.bfloat16, PARTS, layout=layout)
    with guarded_outputs() as memories, native.planning(value):
        check(x, groups, arguments, "silu", "cuda")
        check_gradients(x, groups, arguments, "cuda")
    assert len(memories) == 3  # y, y for the gradients, dx
    for memory in memories:
        assert (memory[:GUARD] == 7).all()
        assert (memory[-GUARD:] == 7).all()


@contextlib.contextmanager
def guarded_outputs():
    """Put outputs into larger memories, which are listed, with sevens before and after."""
    memories = []
    make_output = _module().make_output

    def make_guarded(h, shape):
        out = make_output(h, shape)
        memory = torch.full((math.prod(shape) + 2 * GUARD,), 7, dtype=h.dtype)
        inside = torch.as_strided(memory, out.tensor.shape, out.tensor.stride(), GUARD)
        inside.fill_(math.nan)
        memories.append(memory)
        return Operand(inside, out.strides)

    with mock.patch.object(_module(), "make_output", make_guarded):
        yield memories


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parameters_of_other_dtypes(dtype):
    x, arguments = make((2, 24, 5, 6), torch.bfloat16, PARTS)
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    check(x, 4, arguments, "silu", "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=3), "dtype must be 0"),
        (dict(sizes=(2, 30, 24, 24, 5)), "num_groups must divide the channels, got 5 for 24"),
        (dict(sizes=(2, 30, 24, 20, 4)), "got 20 of 24"),
        (dict(sizes=(2, 30, 1 << 21, 1 << 21, 4)), "at most 2\\^20 channels"),
        (dict(sizes=(0, 30, 24, 24, 4)), "must have elements"),
        (dict(h=0), "x has no memory"),
        (dict(y=0), "y, mean and rstd need memory"),
        (dict(sizes=(2, 300000, 24, 24, 4), floats=7), "the workspace must have [0-9]+ floats, got 7"),
    ],
)
def test_launcher_refuses(change, message):
    given = dict(h=64, y=64, dtype=0, sizes=(2, 30, 24, 24, 4), floats=0) | change
    problem = ((given["h"], 720, 30, 1), None, [None] * 5, given["sizes"], given["dtype"], 1e-5, False)
    like = torch.empty(0)
    with pytest.raises(RuntimeError, match=message):
        native.launch("group_norm", like, problem, (given["y"], 720, 30, 1), 64, 64, 64, given["floats"], 80)


def test_one_call_of_each_kind_of_launch():
    """The single launch needs no workspace, and clusters hold what one block does not."""
    floats = {
        (shape, value): native.cuda().group_norm_workspace(problem(shape), strides(shape), value)
        for shape in ((1, 768, 64), (1, 192, 4096), (1, 256, 65536))
        for value in (80, 90)
    }
    assert [bool(f) for f in floats.values()] == [False, False, True, False, True, True]


@pytest.mark.parametrize(
    ("shape", "dtype", "capability"),
    [((1, 1024, 256), "float16", 120), ((1, 1024, 16), "float32", 86), ((1, 70000, 1024), "float32", 80)],
)
def test_what_no_block_or_grid_takes_has_two_launches(shape, dtype, capability):
    """A block has 99 KiB of shared memory on GeForce cards, and a grid 65,535 tiles."""
    code = list(native.DTYPES).index(getattr(torch, dtype))
    groups = 1 if shape[1] == 1024 else shape[1]
    order = (64, shape[1] * shape[2], 1, shape[1]) if groups == 1 else (64, shape[1] * shape[2], shape[2], 1)
    given = (order, None, [None] * 5, (1, shape[2], shape[1], shape[1], groups), code, 1e-5, False)
    assert native.cuda().group_norm_workspace(given, order, capability)
    if groups == 1:
        x, arguments = make((1, 1024, shape[2], 1), getattr(torch, dtype), PARTS, layout="channels_last")
        with native.planning(capability):
            check(x, 1, arguments, "silu", "cuda")


def problem(shape):
    n, c, p = shape
    return strides(shape), None, [None] * 5, (n, p, c, c, 32), 2, 1e-5, True


def strides(shape):
    _, c, p = shape
    return 64, c * p, 1, c
