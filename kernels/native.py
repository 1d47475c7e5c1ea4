"""The way into the compiled extensions cmfast._cpu and cmfast._cuda.

Their launchers take addresses, sizes, strides and dtype codes, and a stream and a device or a number of threads, and
know nothing of torch. What they cannot know is checked here or in the operator's file: that tensors are of one device,
and that they live until the launch is on the stream (they do: the caller holds them).
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import recorder

#: Codes of the dtypes that the kernels have.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Dtypes of timesteps that are counted.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_REBUILD = "run `pip install --force-reinstall --no-deps cmfast` from source, or `pip install -e .` in a checkout"
_NOT_BUILT = {
    "_cpu": f"the extension cmfast._cpu was not built: with g++ on PATH, or CXX naming a C++ compiler, {_REBUILD}",
    "_cuda": "the extension cmfast._cuda was not built: with nvcc on PATH, or CUDA_HOME naming a CUDA toolkit "
    f"(12.8 or newer), {_REBUILD}",
}
_stand_in: dict[str, ModuleType] = {}
_planned_capability = 80


def cpu() -> ModuleType:
    """The module cmfast._cpu; ImportError, with the command that builds it, where it was not built."""
    return _module("_cpu")


def cuda() -> ModuleType:
    """The module cmfast._cuda; ImportError, with the command that builds it, where it was not built."""
    return _module("_cuda")


def _module(name: str) -> ModuleType:
    if name in _stand_in:
        return _stand_in[name]
    found = _built(name)
    if isinstance(found, str):
        raise ImportError(found)
    return found


@contextlib.contextmanager
def stand_in(module: ModuleType, name: str = "_cuda") -> Iterator[None]:
    """Within the `with` block, let `module` serve what the extension would: another build of the same bindings.

    The `cuda` backend still refuses CPU tensors unless CMFAST_GPU_ON_CPU=1.
    """
    previous = dict(_stand_in)
    _stand_in[name] = module
    try:
        yield
    finally:
        _stand_in.clear()
        _stand_in.update(previous)


def capability(tensor: Tensor) -> int:
    """The compute capability that launches are chosen for, 80 for 8.0: that of the code which runs on the device.

    Of CPU tensors it is the one that `planning` says, or 80.
    """
    return _device_capability(tensor.get_device()) if tensor.is_cuda else _planned_capability


@contextlib.contextmanager
def planning(capability: int) -> Iterator[None]:
    """Within the `with` block, choose launches for CPU tensors as for a GPU of this compute capability."""
    global _planned_capability
    previous, _planned_capability = _planned_capability, capability
    try:
        yield
    finally:
        _planned_capability = previous


def launch(name: str, like: Tensor, *arguments: Any) -> None:
    """Call a launcher for tensors on the device of `like`, on that device's current stream.

    Raises RuntimeError with the launcher's message.
    """
    launcher = getattr(cuda(), name)
    if (record := recorder.current()) is not None:
        record.launched(launcher, (*arguments, recorder.STREAM, recorder.DEVICE))
    if not like.is_cuda:
        error = launcher(*arguments, 0, -1)
    else:
        device = like.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        if device == torch._C._cuda_getDevice():
            error = launcher(*arguments, stream, device)
        else:
            with torch.cuda.device(device):
                error = launcher(*arguments, stream, device)
    if error:
        raise RuntimeError(f"cmfast._cuda.{name}: {error}")


def run(name: str, *arguments: Any) -> None:
    """Call a launcher of the CPU kernels, with as many threads as torch has.

    Raises RuntimeError with the launcher's message.
    """
    error = getattr(cpu(), name)(*arguments, torch.get_num_threads())
    if error:
        raise RuntimeError(f"cmfast._cpu.{name}: {error}")


@contextlib.contextmanager
def recording(program: Any) -> Iterator[None]:
    """Append this thread's calls of launchers of the CPU kernels to a cmfast._cpu.Program, within the `with` block.

    They run when the program does; their tensors must live as long as it.
    """
    program.record(True)
    try:
        yield
    finally:
        program.record(False)


def address(tensor: Tensor | None) -> int:
    """Where the tensor's elements are, for a launcher; 0 for none."""
    if tensor is None:
        return 0
    record = recorder.current()
    return tensor.data_ptr() if record is None else record.address(tensor)


@functools.cache
def _device_capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    built = (name.rpartition("_")[2] for name in cuda().build_info()["architectures"].split(", "))
    # Code for an earlier one has nothing that came later, such as clusters; "90a" and "100f" are for that one alone.
    runs = [code for code in built if _runs(code, 10 * major + minor)]
    return max((int(code.rstrip("af")) for code in runs), default=80)


def _runs(code: str, capability: int) -> bool:
    """Whether code such as "80", "90a" or "100f" runs on devices of this capability."""
    return int(code) <= capability if code.isdigit() else int(code.rstrip("af")) == capability


@functools.cache
def _built(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(f"cmfast.{name}")
    except ModuleNotFoundError:
        return _NOT_BUILT[name]
    except ImportError as error:
        return f"the extension cmfast.{name} does not load: {error}"
