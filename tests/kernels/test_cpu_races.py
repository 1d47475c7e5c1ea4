"""Do the CPU kernels' threads race? The thread sanitizer runs every kernel; a barrier left out shows that it would see.

`make sanitize` asks for this, by CMFAST_SANITIZE=thread.
"""

import os
import subprocess
import sys

import pytest

from . import emulation

pytestmark = pytest.mark.skipif(os.environ.get("CMFAST_SANITIZE") != "thread", reason="make sanitize runs this")

CODE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
from cmfast import kernels
from cmfast.kernels import native
torch.set_num_threads(3)
module.set_fault(module.FAULTS.index(sys.argv[2]) if len(sys.argv) > 2 else -1)
with native.stand_in(module, "_cpu"):
    for isa in module.build_info()["isas"].split(", "):
        module.set_isa(isa)
        x = torch.randn(2, 20, 13, 17)
        for x in (x, x.contiguous(memory_format=torch.channels_last)):
            leaf, few = x.requires_grad_(), x[:1].detach().requires_grad_()
            rows = leaf.flatten(2).mT[:, None, :200]
            results = (
                kernels.consistency_step(leaf, leaf, 0.5, 0.3, beta=0.5, seed=3, backend="cpu").sample,
                kernels.group_norm((leaf, leaf), 20, activation="silu", backend="cpu"),
                kernels.group_norm(few, 2, activation="silu", backend="cpu"),  # groups that threads share
                kernels.attention(leaf, leaf, leaf, backend="cpu"),
                kernels.attention(rows, rows, rows, backend="cpu"),  # heads that they share
            )
            for y in results:
                y.sum().backward()
            x = x.detach()
            kernels.channel_moments(x.repeat(1, 8, 1, 1), backend="cpu")
            for height, outputs in ((13, 3000), (13 * 17 * 8, 50)):  # threads with panels of their own, or rows
                prepared = kernels.prepare_conv(torch.randn(outputs, 20, 1, 1), height=height, width=17)
                kernels.conv2d(x.repeat(1, 1, height // 13, 1), prepared, moments=True, backend="cpu")
            for tile, transformed in ((1, None), (2, True), (4, True), (4, False)):
                for outputs in (3, 160):  # threads with blocks of their own, and threads that share one
                    weight = torch.randn(outputs, 20, 3, 3)
                    form = {"tile": tile, "transformed": transformed}
                    if tile == 1:  # by tiles where there are any
                        narrow = kernels.prepare_conv(
                            weight, padding=1, height=13, width=17, tile=1, dtype=torch.bfloat16
                        )
                        kernels.conv2d(x, narrow, moments=True, backend="cpu")
                    prepared = kernels.prepare_conv(weight, padding=1, height=13, width=17, **form)
                    kernels.conv2d(x, prepared, moments=True, backend="cpu")
        for channels, size in ((20, 9), (110, 4)):  # blocks of a thread's own, and shared ones
            video = torch.randn(2, 20, 3, size, size)
            prepared = kernels.prepare_conv(
                torch.randn(channels, 20, 3, 3, 3), padding=1, depth=3, height=size, width=size
            )
            kernels.conv2d(video, prepared, moments=True, backend="cpu")
print("ran")
"""
RACES = 66


def run(*fault):
    toolchain = emulation.toolchain()
    module = emulation.cpu_module("thread")
    library = subprocess.run(
        [*toolchain.find_host_compiler(), "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Addresses that are not drawn: the sanitizer of g++ 12 knows fewer of them than newer kernels draw from.
    command = ["setarch", "-R", sys.executable, "-c", CODE, str(module), *fault]
    options = {
        "LD_PRELOAD": library,
        "TSAN_OPTIONS": f"report_signal_unsafe=0 exitcode={RACES}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=900)


def test_no_kernel_races():
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"


def test_a_missing_barrier_is_seen():
    done = run("barrier_missed")
    assert done.returncode == RACES, done.stderr
    assert "data race" in done.stderr
