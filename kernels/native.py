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
def _built() -> ModuleType | str:
    try:
        return importlib.import_module("cmfast._cuda")
    except ModuleNotFoundError:
        return _NOT_BUILT
    except ImportError as error:
        return f"the extension cmfast._cuda does not load: {error}"
