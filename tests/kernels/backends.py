"""The backends that this machine can test, as a pytest parameter: the case lists are the same for all of them.

Without a GPU, Triton's interpreter and the emulation of the CUDA kernels take CPU tensors; "cuda" is then tested under
several schedules of its threads. "cpu" is tested on every instruction set of this machine, and where the processor has
no tiles, on a build in which amx has a twin of them. With a GPU, conftest.py runs the kernels on copies of the tests'
tensors there.
"""

import contextlib
import os
from unittest import mock

import pytest
import torch
from cmfast.kernels import backends, native

from . import emulation

ON_GPU = torch.cuda.is_available()


@contextlib.contextmanager
def gpu_kernels():
    """Let the GPU backends serve CPU tensors where there is no GPU."""
    if ON_GPU:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", {"CMFAST_GPU_ON_CPU": "1"}))
        if not emulation.missing():
            stack.enter_context(native.stand_in(emulation.emulated()))
        yield


def cpu_kernels():
    """Let the build with sanitizers serve as the CPU kernels, where CMFAST_SANITIZE=1 asks for it."""
    if os.environ.get("CMFAST_SANITIZE") != "1":
        return contextlib.nullcontext()
    return native.stand_in(emulation.cpu_kernels("address,undefined"), "_cpu")


def isas_of(op: str) -> list[str]:
    """The instruction sets of this machine that have kernels of their own for `op`; "twin" stands in for amx."""
    isas = native.cpu().build_info()["isas"].split(", ")
    if op not in ("conv2d", "attention"):
        return [isa for isa in isas if isa not in ("amx", "avx512bf16")]
    return isas if "amx" in isas or emulation.missing() or "avx2" not in isas else [*isas, "twin"]


def served(op: str) -> list:
    """A parameter a backend and schedule; backends that cannot serve `op` here are skipped with their reason."""
    with gpu_kernels(), cpu_kernels():
        answers = {name: backends.available(name, op) for name in backends.BACKENDS}
    found = []
    for name, (ok, reason) in answers.items():
        if name == "cuda" and ok and not ON_GPU:
            marks = [pytest.mark.schedule(seed) for seed in emulation.SCHEDULES]
            found += [pytest.param(name, marks=mark, id=f"cuda-{mark.args[0]}") for mark in marks]
        elif name == "cpu" and ok:
            found += [pytest.param(name, marks=pytest.mark.isa(isa), id=f"cpu-{isa}") for isa in isas_of(op)]
        elif not ok and reason.startswith("there is no "):
            continue  # it has none anywhere
        else:
            skip = pytest.mark.skip(reason=f"{name}: {emulation.missing() if name == 'cuda' else ''} {reason}")
            found.append(pytest.param(name, marks=[] if ok else skip))
    return found
