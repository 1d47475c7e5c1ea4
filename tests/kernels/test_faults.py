"""Do the tests notice a fault in a CUDA kernel? Each numbered barrier, wait and bound of csrc/cuda is broken in turn.

The emulated build breaks it while it runs (see csrc/cuda/primitives.cuh). A few cases of the operator's own tests must
then fail, by a wrong result or by a launch that ends with a message, under some schedule. So must they where a formula
is changed in a copy of the source.
"""

import contextlib
import re
import shutil
import sysconfig
from unittest import mock

import pytest
import torch
from cmfast.kernels import native
from cmfast.kernels.cuda import conv_plan

from . import emulation, test_attention, test_consistency, test_conv, test_conv_cuda, test_group_norm

pytestmark = [
    pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing()),
    pytest.mark.skipif(emulation.sanitizes(), reason="the address sanitizer ends the process at a fault"),
]


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


def attention_cases(dtypes):
    """Both orders of three tiles, in vectors and by elements; and scores so low that weights outside are infinite."""
    for dtype in dtypes:
        positions = 80 if dtype == torch.float32 else 136  # tiles of 32 and 64
        for packing in ("ntc", "nct"):
            for frame, more in ((16, 0), (5, 1)):
                shape = (1, 1, positions + more, positions + more, 24)
                q, k, v, grad = test_attention.make(shape, dtype, packing, frame=frame)
                with test_attention.guarded_outputs("cuda"):
                    test_attention.check(q, k, v, "cuda")
                    test_attention.check_gradients(grad, q, k, v, "cuda")
        test_attention.check(q, k, v, "cuda", -0.3)
        test_attention.check(q, k * torch.linspace(0.1, 5, k.shape[2])[:, None].to(dtype), v, "cuda")
        q, k, v, grad = test_attention.make((1, 1, 20, 37, 16), dtype, amount=0.1)
        test_attention.check_gradients(grad, q + 1, k - 20, v, "cuda", 1.0)


def group_norm_cases():
    """Two launches, one, and one by clusters; groups that end within a tile and that span several."""
    for shape, groups, pair, layout, capability in (
        ((1, 48, 32, 33), 8, 17, "channels_last", 80),
        ((1, 12, 67, 67), 2, 7, "contiguous", 80),
        ((2, 24, 9, 8), 4, 0, "channels_last", 80),
        ((1, 24, 33, 32), 4, 0, "channels_last", 90),
    ):
        x, arguments = test_group_norm.make(shape, torch.float32, test_group_norm.PARTS, layout=layout, pair=pair)
        with native.planning(capability):
            test_group_norm.check(x, groups, arguments, "silu", "cuda")


def group_norm_gradient_cases():
    for shape, groups, layout in (((1, 48, 32, 33), 8, "channels_last"), ((1, 12, 67, 67), 2, "contiguous")):
        x, arguments = test_group_norm.make(shape, torch.float32, test_group_norm.PARTS, layout=layout)
        test_group_norm.check_gradients(x, groups, arguments, "cuda")


def conv_cases():
    """Tiles and segments with rests, an odd number of steps; beyond the channels of the images lies NaN."""
    with mock.patch.object(conv_plan, "PROGRAMS", 6):
        for name in ("odd", "pair"):
            *sizes, pair, parts = test_conv.SIXTEEN_BIT[name]
            x, weight, bias, arguments = test_conv.make((*sizes, 3, 1, 1), torch.bfloat16, "l", pair=pair, parts=parts)
            x = tuple(map(test_conv.among_others, x)) if pair else test_conv.among_others(x)
            with test_conv_cuda.guarded_outputs():
                test_conv.check(x, weight, bias, arguments, 1, 1, None, torch.bfloat16, "cuda", as_plain=False)
                test_conv.check_moments(x, weight, bias, arguments, "cuda", rtol=1e-2, atol=1e-2)


#: The cases that a file's faults must fail.
CASES = {
    "consistency.cu": consistency_cases,
    "attention_tiles.cuh": lambda: attention_cases([torch.float16, torch.float32]),
    "attention_fma.cuh": lambda: attention_cases([torch.float32]),
    "attention_forward.cu": lambda: attention_cases([torch.float16]),
    "attention_forward_float.cu": lambda: attention_cases([torch.float32]),
    "attention_backward.cu": lambda: attention_cases([torch.float16]),
    "attention_backward_float.cu": lambda: attention_cases([torch.float32]),
    "conv.cu": conv_cases,
    "conv_sum.cu": conv_cases,
    "conv_tile.cuh": conv_cases,
    "group_norm.cu": group_norm_cases,
    "group_norm_backward.cu": group_norm_gradient_cases,
    "group_norm_tile.cuh": group_norm_cases,
    "moments.cuh": conv_cases,
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


#: File, old text, new text. The old text occurs once in the file.
MUTANTS = {
    "unscaled softmax": ("attention_forward.cu", "p.scale * LOG2_E", "LOG2_E"),
    "sums not rescaled": ("attention_forward.cu", "row[2 * r] *= shrink;", ""),
    "maximum before a negative scale": ("attention_forward_float.cu", "p.scale > 0", "true"),
    "delta dropped": ("attention_backward.cu", "dscores[j][i] - delta[i / 2]", "dscores[j][i]"),
    "padding that is activated": ("conv_tile.cuh", "if (!(inside >> i & 1)) return;", ""),
    "means of tiles apart": ("moments.cuh", " + apart * apart * count * part", ""),
    "unscaled gradient": ("attention_backward_float.cu", "= {p.scale, p.scale}, one", "= {1.0f, 1.0f}, one"),
}


@pytest.mark.skipif(emulation.sanitizes(), reason="what the sanitizers look at is the same")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    file, old, new = MUTANTS[name]
    emulation.emulated()
    shutil.copytree(emulation.ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    objects = shutil.copytree(emulation.folder(), tmp_path / "objects")  # of the sources that stay as they are
    source = tmp_path / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old!r}"
    source.write_text(text.replace(old, new))
    target = tmp_path / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    emulation.load("toolchain_of_mutant", tmp_path / "csrc" / "toolchain.py").build_emulation(target, objects)
    mutant = emulation.load(f"{name}._emulated", target)  # pybind11 gives a module that it has by name again
    assert mutant is not emulation.emulated()
    with native.stand_in(mutant), pytest.raises(AssertionError):
        CASES[file]()


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
