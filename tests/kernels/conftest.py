import contextlib
import importlib.util
import sys

import pytest
import torch
from cmfast.kernels import native
from torch.utils import _pytree as pytree

from ..interpreter import make_faster
from . import emulation
from .backends import ON_GPU, cpu_kernels, gpu_kernels

make_faster()

#: The files of the operators that a GPU serves.
_OPERATORS = (
    "group_norm",
    "attention",
    "consistency",
    "conv",
    "moments",
    "apply_group_norm",
    "channel_norm",
    "timestep_embedding",
)


@pytest.fixture(autouse=True)
def _gpu_kernels(request):
    """Let the tests of the operators ask for a GPU backend by name: see backends.py."""
    # A patch of its own: the test's, undone after this fixture, would bring back what is in place here.
    with gpu_kernels(), cpu_kernels(), pytest.MonkeyPatch.context() as patch:
        for op in _OPERATORS if ON_GPU else ():
            module = sys.modules[f"cmfast.kernels.{op}"]
            patch.setattr(module, "resolve", _on_gpu(module.resolve))
            # The definition takes the tensors where they are.
            patch.setattr(module, "require", lambda *_: None, raising=False)
        schedule = request.node.get_closest_marker("schedule")
        if schedule:
            emulation.emulated().set_schedule(schedule.args[0])
        yield


@pytest.fixture
def fewer_programs(monkeypatch):
    """Divide what an interpreter gets among fewer programs, in the same ways: it runs them one by one.

    The CUDA convolution refuses what gives fewer of them, on a GPU as well: there it serves small tests so.
    """
    monkeypatch.setattr("cmfast.kernels.cuda.conv_plan.PROGRAMS", 6)
    if ON_GPU or importlib.util.find_spec("triton") is None:
        return
    for module in ("moments_tiles", "moments", "conv_config"):
        monkeypatch.setattr(f"cmfast.kernels.triton.{module}.PROGRAMS", 6)


@pytest.fixture(autouse=True)
def _isa(request, _gpu_kernels):
    """Choose the CPU kernels that the test's parameter names."""
    marker = request.node.get_closest_marker("isa")
    if marker is None:
        yield
        return
    (isa,) = marker.args
    with native.stand_in(emulation.cpu_kernels("twin"), "_cpu") if isa == "twin" else contextlib.nullcontext():
        previous = native.cpu().build_info()["isa"]
        assert native.cpu().set_isa("amx" if isa == "twin" else isa) == ""
        yield
        native.cpu().set_isa(previous)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request):
    """Fill torch.empty with NaN: an element that a kernel leaves unwritten, or reads before it is, shows."""
    if "compile" in request.node.name or "opcheck" in request.node.name:
        yield
        return
    # torch.use_deterministic_algorithms does this after it has imported Inductor, which takes seconds a process.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    yield
    torch._C._set_deterministic_algorithms(False)


def _on_gpu(resolve):
    """The function that `resolve` gives for copies of the tensors on the GPU, of CPU tensors."""

    def resolve_on_gpu(op, tensors, backend=None, arguments=None):
        serve = resolve(op, [_copy(t, "cuda") for t in tensors], backend, arguments)

        def run(*arguments):
            copies = pytree.tree_map_only(torch.Tensor, lambda t: _copy(t, "cuda"), arguments)
            return pytree.tree_map_only(torch.Tensor, lambda t: _copy(t, "cpu"), serve(*copies))

        return run

    return resolve_on_gpu


def _copy(t, device):
    """The tensor on another device with the whole of its memory: what is around a view comes along."""
    storage = t.untyped_storage()
    copy = torch.empty(0, dtype=t.dtype, device=device)
    there = torch.UntypedStorage(storage.nbytes(), device=device).copy_(storage)
    return copy.set_(there, t.storage_offset(), t.shape, t.stride())
