"""What the CPU kernels share: the threads of torch, one result whatever their number, and code for older processors."""

import shutil
import subprocess
import sys
import threading

import pytest
import torch
from cmfast.kernels import (
    attention,
    channel_moments,
    consistency_step,
    conv2d,
    fold_group_norm,
    group_norm,
    native,
    prepare_conv,
)
from cmfast.kernels.conv_forms import SPLIT, has_tiles

from . import emulation
from .backends import served

CALLS = {
    "consistency_step": lambda x: consistency_step(x, x, 0.5, 0.3, beta=0.7, seed=3, backend="cpu").sample,
    "group_norm": lambda x: group_norm((x, x), 8, activation="silu", backend="cpu"),
    "attention": lambda x: attention(x, x, x, backend="cpu"),
    "consistency_step_backward": lambda x: gradient(CALLS["consistency_step"], x),
    "group_norm_backward": lambda x: gradient(CALLS["group_norm"], x),
    "group_norm_backward-shared": lambda x: gradient(
        lambda x: group_norm(x, 1, activation="silu", backend="cpu"), x[:1]
    ),
    "attention_backward": lambda x: gradient(CALLS["attention"], x),
    "attention_backward-shared": lambda x: gradient(CALLS["attention"], x.flatten(1, 2)[:, None]),
    "conv2d": lambda x: convolve(x, 20),
    "moments": lambda x: channel_moments(x, backend="cpu"),
    "fold_group_norm": lambda x: torch.cat(fold(x)),
    "conv2d-1x1": lambda x: torch.cat([t.flatten() for t in pointwise(x, 100)]),
    "conv2d-1x1-shared": lambda x: torch.cat([t.flatten() for t in pointwise(x[..., :9, :8], 4000)]),
    "conv2d-shared": lambda x: convolve(x[..., :8, :8], 160),  # too few tiles for blocks of a thread's own
    "conv2d-transformed-at-use": lambda x: convolve(x[..., :8, :8], 160, transformed=False),
    "conv2d-audio": lambda x: convolve(x.flatten(2), 20),
    "conv2d-video": lambda x: convolve(x[:, :, :30].unflatten(2, (5, 6)), 20),
    "conv2d-video-shared": lambda x: convolve(x[:, :, :8, :8].unflatten(2, (2, 4)), 160),
}


def gradient(f, x):
    leaf = x.detach().requires_grad_()
    y = f(leaf)
    (found,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape).sin())
    return found


def convolve(x, outputs, **form):
    dims = x.ndim - 2
    weight = torch.linspace(-1, 1, outputs * x.shape[1] * 3**dims).view(outputs, x.shape[1], *(3,) * dims).sin()
    sizes = dict(zip(("depth", "height", "width")[-dims:], x.shape[2:], strict=True))
    prepared = prepare_conv(weight, padding=1, **sizes, **form)
    return conv2d(x, prepared, silu=True, backend="cpu").out


def fold(x):
    moments = x.flatten(1)[:, : x.shape[1] * 20].view(-1, 2, 10 * x.shape[1]).contiguous()
    return fold_group_norm(moments.abs(), 7, 4, moments[0, 0], moments[0, 1], backend="cpu")


def pointwise(x, outputs):
    weight = torch.linspace(-1, 1, outputs * x.shape[1]).view(outputs, x.shape[1], 1, 1).sin()
    return conv2d(x, prepare_conv(weight, height=x.shape[2], width=x.shape[3]), silu=True, moments=True, backend="cpu")


ISAS = [parameter for parameter in served("consistency_step") if parameter.values[0] == "cpu"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_number_of_threads_changes_no_bit(op, layout, backend):
    x = torch.randn(2, 20, 33, 67).contiguous(memory_format=layout)
    torch.set_num_threads(1)
    expected = CALLS[op](x)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(CALLS[op](x), expected), threads


def _alone(op, x, outputs):
    """What `op` gives for a batch, each tensor [N, ...]."""
    kernel, form = (int(op[4]), FORMS[op[5:].lstrip("-")]) if op.startswith("conv") else (0, None)
    if op == "group_norm":
        return [group_norm(x, 4, activation="silu", backend="cpu")]
    if op == "attention":
        return [attention(*[x.flatten(2).mT[:, None]] * 3, backend="cpu")]
    if op == "moments":
        return [channel_moments(x, backend="cpu")]
    weight = torch.linspace(-1, 1, outputs * x.shape[1] * kernel**2).view(outputs, x.shape[1], kernel, kernel).sin()
    sizes = dict(height=x.shape[2], width=x.shape[3])
    prepared = prepare_conv(weight, padding=kernel // 2, **sizes, **form)
    result = conv2d(x, prepared, silu=True, moments=True, backend="cpu")
    return [result.out, result.moments]


F32, BF16 = torch.float32, torch.bfloat16
FORMS = {
    "": {},
    "bfloat16": {"dtype": BF16},
    "direct": {"tile": 1},
    "F2": {"tile": 2},
    "F4": {"tile": 4, "transformed": True},
    "F4-at-use": {"tile": 4, "transformed": False},
    "F4-bfloat16": {"tile": 4, "dtype": BF16},
    "direct-bfloat16": {"tile": 1, "dtype": BF16},
}
ALONE = ["group_norm", "attention", "moments", "conv1", "conv1-bfloat16", *(f"conv3-{f}" for f in FORMS if f)]


@pytest.mark.parametrize("backend", [p for p in served("conv2d") if p.values[0] == "cpu"])
@pytest.mark.parametrize("op", ALONE)
@pytest.mark.parametrize(
    ("size", "outputs"), [((33, 67), 20), ((10, 10), 160), ((4, 4), 20), ((1, 70), 20), ((1, 1), 300)], ids=str
)
def test_a_sample_has_the_same_bits_in_every_batch(op, size, outputs, backend):
    """Whatever the number of threads: parts whose moments are merged are no others, nor are sums cut elsewhere."""
    x = torch.randn(5, 20, *size).contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(1)
    alone = [torch.cat(found) for found in zip(*(_alone(op, x[i : i + 1], outputs) for i in range(5)), strict=True)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for first, last in ((0, 1), (1, 3), (0, 5)):
            for expected, actual in zip(alone, _alone(op, x[first:last], outputs), strict=True):
                assert torch.equal(actual, expected[first:last]), (threads, first, last)


def test_the_threads_are_those_of_torch():
    """In a process of its own: the kernels make no thread that torch would not, and torch makes none after them."""
    code = """
import os, torch
from cmfast.kernels import group_norm, native
native.cpu()
x = torch.randn(4, 64, 64, 64)
def threads(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
group_norm(x, 8, backend="cpu")
alone = threads()
torch.set_num_threads(3)
group_norm(x, 8, backend="cpu")
assert threads() == alone + 2, (alone, threads())
torch.softmax(x, 3)
assert threads() == alone + 2, (alone, threads())
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
assert len(libraries) == 1, libraries
"""
    if not served_here():
        pytest.skip("the CPU kernels are not built")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def served_here():
    try:
        return bool(native.cpu())
    except ImportError:
        return False


@pytest.mark.parametrize("op", CALLS)
def test_several_threads_may_call(op):
    if not served_here():
        pytest.skip("the CPU kernels are not built")
    inputs = [torch.randn(1, 8, 40 + i, 24) for i in range(4)]
    expected = [CALLS[op](x) for x in inputs]
    wrong = []

    def call(i):
        torch.set_num_threads(2)
        wrong.extend(i for _ in range(5) if not torch.equal(CALLS[op](inputs[i]), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(bool(emulation.missing()) or not shutil.which("nm"), reason=emulation.missing() or "nm is not here")
def test_nothing_that_the_linker_merges_is_compiled_for_a_newer_processor(tmp_path):
    """A weak symbol of an object may replace that of another, and run where the processor has no such instructions."""
    toolchain = emulation.toolchain()
    flags = toolchain.cpu_isas()
    compiled = [(isa, path) for isa in [*flags][-3::2] for path in toolchain.cpu_sources(isa)]
    for isa, path in compiled:
        target = tmp_path / f"{path.stem}-{isa}.o"
        command = [*toolchain.find_host_compiler(), "-std=c++17", "-O0", "-fno-exceptions", "-Wno-psabi", *flags[isa]]
        subprocess.run([*command, f"-DCMFAST_ISA={isa}", "-c", str(path), "-o", str(target)], check=True, timeout=120)
        symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if line.split()[-2:-1] and line[17:18] in "WVu"]
        assert [line for line in weak if f"cmfast::{isa}::" not in line] == [], path.name


@pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())
@pytest.mark.parametrize("form", [(1, False, torch.bfloat16), SPLIT], ids=["bf16", "split"])
def test_the_twin_of_the_tiles_has_their_bits(form):
    if not has_tiles():
        pytest.skip("the processor has no tiles")
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 70, 9, 19, generator=g) * 2.0 ** torch.randint(-40, 40, (70, 1, 1), generator=g)).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(50, 70, 3, 3, generator=g)
    outs = []
    for module, isa in ((native.cpu(), "amx"), (emulation.cpu_kernels("twin"), "amx")):
        with native.stand_in(module, "_cpu"):
            previous = module.build_info()["isa"]
            assert module.set_isa(isa) == ""
            tile, transformed, dtype = form
            prepared = prepare_conv(
                weight, padding=1, height=9, width=19, tile=tile, transformed=transformed, dtype=dtype
            )
            outs.append(conv2d(x, prepared, backend="cpu").out)
            module.set_isa(previous)
    assert torch.equal(*outs)
    assert outs[0].abs().max() > 1e6


@pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing())
def test_weights_that_lie_for_another_instruction_set_are_refused():
    module = emulation.cpu_kernels("twin")
    x = torch.randn(1, 32, 6, 6)

    def prepare(dtype):
        return prepare_conv(torch.randn(32, 32, 3, 3), padding=1, height=6, width=6, dtype=dtype)

    with native.stand_in(module, "_cpu"):
        previous = module.build_info()["isa"]
        try:
            for here, there in (("amx", "portable"), ("portable", "amx")):
                module.set_isa(here)
                narrow, plain = prepare(torch.bfloat16), prepare(torch.float32)
                module.set_isa(there)
                with pytest.raises(RuntimeError, match="packed for another instruction set: prepare them here"):
                    conv2d(x, narrow, backend="cpu")
                out = conv2d(x, plain, backend="cpu").out
                torch.testing.assert_close(out, conv2d(x, plain, backend="reference").out, rtol=1e-4, atol=1e-4)
            other = plain._replace(packed=torch.zeros_like(plain.packed))
            with pytest.raises(RuntimeError, match="not what `pack` wrote"):
                conv2d(x, other, backend="cpu")
        finally:
            module.set_isa(previous)
