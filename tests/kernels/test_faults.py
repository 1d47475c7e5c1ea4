"""Do the tests notice a fault in a CUDA kernel? Each numbered barrier, wait and bound of csrc/cuda is broken in turn.

The emulated build breaks it while it runs (see csrc/cuda/primitives.cuh). A few cases of the operator's own tests must
then fail, by a wrong result or by a launch that ends with a message, under some schedule.
"""

import contextlib
import re

import pytest
import torch
from cmfast.kernels import native

from . import emulation, test_consistency, test_group_norm, test_group_norm_cuda

pytestmark = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())


def consistency_cases():
    """Dense and strided, forward and backward, of more than one tile and a rest."""
    make, forms, dtypes = test_consistency.make, test_consistency.FORMS, test_consistency.DTYPES
    for layouts, shape in (("cc", (2, 3, 12, 33)), ("ll", (2, 3, 12, 33)), ("lc", (2, 3, 11, 33))):
        x, model_output, arguments = make(shape, dtypes["fp32"], forms["seed-vectors"], layouts=layouts)
        with test_consistency.guarded_outputs("cuda", layouts[0]):
            test_consistency.check(x, model_output, arguments, "cuda")
        form = forms["noise-vectors"] | test_consistency.FAR_CLIP
        x, model_output, arguments = make(shape, dtypes["fp32"], form, layouts=layouts)
        gradients = test_consistency.make_gradients(shape, dtypes["fp32"], layouts[0])
        with test_consistency.guarded_outputs("cuda", layouts[0]):
            test_consistency.check_gradients(x, model_output, arguments, test_consistency.OUTPUTS, gradients, "cuda")


def group_norm_cases():
    """Two launches, one, and one by clusters; groups that end within a tile and that span several."""
    for shape, groups, pair, layout, capability in (
        ((1, 48, 32, 33), 8, 17, "channels_last", 80),
        ((1, 12, 67, 67), 2, 7, "contiguous", 80),
        ((2, 24, 9, 8), 4, 0, "channels_last", 80),
        ((1, 24, 33, 32), 4, 0, "channels_last", 90),
    ):
        x, arguments = test_group_norm.make(shape, torch.float32, test_group_norm.PARTS, layout=layout, pair=pair)
        with test_group_norm_cuda.capability(capability):
            test_group_norm.check(x, groups, arguments, "silu", "cuda")


def group_norm_gradient_cases():
    for shape, groups, layout in (((1, 48, 32, 33), 8, "channels_last"), ((1, 12, 67, 67), 2, "contiguous")):
        x, arguments = test_group_norm.make(shape, torch.float32, test_group_norm.PARTS, layout=layout)
        test_group_norm.check_gradients(x, groups, arguments, "cuda")


#: The cases that a file's faults must fail.
CASES = {
    "consistency.cu": consistency_cases,
    "group_norm.cu": group_norm_cases,
    "group_norm_backward.cu": group_norm_gradient_cases,
    "group_norm_tile.cuh": group_norm_cases,
}

_NUMBERED = re.compile(r"CMFAST_(?:SYNC|SYNC_WARP|SYNC_CLUSTER|CP_ASYNC_WAIT|BOUND)\((\d+)[,)]")
FAULTS = {
    path.name: [int(number) for number in _NUMBERED.findall(path.read_text())]
    for path in sorted((emulation.ROOT / "csrc" / "cuda").glob("*.cu*"))
    if path.name != "primitives.cuh"
}


@pytest.mark.parametrize("file", [file for file, numbers in FAULTS.items() if numbers])
def test_healthy(file):
    numbers = FAULTS[file]
    assert len(set(numbers)) == len(numbers)
    run_cases(file)


@pytest.mark.parametrize(("file", "number"), [(file, number) for file, numbers in FAULTS.items() for number in numbers])
def test_fault_is_caught(file, number):
    with seeded(file, number), pytest.raises((AssertionError, RuntimeError)):
        run_cases(file)


def run_cases(file):
    for seed in emulation.SCHEDULES:
        emulation.emulated().set_schedule(seed)
        CASES[file]()


@contextlib.contextmanager
def seeded(file, number):
    assert native.cuda() is emulation.emulated()
    emulation.emulated().set_fault(file, number)
    try:
        yield
    finally:
        emulation.emulated().set_fault("", 0)
