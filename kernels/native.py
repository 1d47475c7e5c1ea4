"""The way into the compiled extension cmfast._cuda.

Its launchers take addresses, sizes, strides, dtype codes, a stream and a device, and know nothing of torch. What they
cannot know is checked here or in the operator's file: that tensors are of one device, and that they live until the
launch is on the stream (they do: the caller holds them).
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Codes of the dtypes that the kernels have.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_NOT_BUILT = (
    "the extension cmfast._cuda was not built: with nvcc on PATH, or CUDA_HOME naming a CUDA toolkit (12.8 or newer), "
    "run `pip install --force-reinstall --no-deps cmfast` from source, or `pip install -e .` in a checkout"
)
_stand_in: ModuleType | None = None
_planned_capability = 80


def cuda() -> ModuleType:
    """The module cmfast._cuda; ImportError, with the command that builds it, where it was not built."""
    if _stand_in is not None:
        return _stand_in
    found = _built()
    if isinstance(found, str):
        raise ImportError(found)
    return found


@contextlib.contextmanager
def stand_in(module: ModuleType) -> Iterator[None]:
    """Within the `with` block, let `module` serve what cmfast._cuda would: a build of the same bindings for the CPU.

    CPU tensors are still refused by the backend unless CMFAST_GPU_ON_CPU=1.
    """
    global _stand_in
    previous, _stand_in = _stand_in, module
    try:
        yield
    finally:
        _stand_in = previous


def capability(tensor: Tensor) -> int:
    """The compute capability of the tensor's device, 80 for 8.0; of CPU tensors that which `planning` says, or 80."""
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


def address(tensor: Tensor | None) -> int:
    """Where the tensor's elements are; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _device_capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _built() -> ModuleType | str:
    try:
        return importlib.import_module("cmfast._cuda")
    except ModuleNotFoundError:
        return _NOT_BUILT
    except ImportError as error:
        return f"the extension cmfast._cuda does not load: {error}"
