"""The CUDA C++ kernels of csrc/cuda: NVIDIA GPUs from Ampere on, compiled when cmfast was installed.

CPU tensors are served only where CMFAST_GPU_ON_CPU=1 says that a simulator or the emulation takes the launches.
"""

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .attention import attention, attention_backward
from .consistency import consistency_step, consistency_step_backward
from .conv import conv2d
from .conv import serves as _serves_conv2d
from .group_norm import group_norm, group_norm_backward

__all__ = [
    "attention",
    "attention_backward",
    "available",
    "consistency_step",
    "consistency_step_backward",
    "conv2d",
    "group_norm",
    "group_norm_backward",
    "serves",
]

#: The operators that have a kernel here.
OPERATORS = tuple(name for name in __all__ if name not in ("available", "serves"))


def available(op: str, tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """Serve float32, float16 and bfloat16 tensors of an NVIDIA GPU of compute capability 8.0 or more."""
    try:
        native.cuda()
    except ImportError as error:
        return False, str(error)
    if op not in OPERATORS:
        return False, f"there is no CUDA kernel for {op}"
    if not tensors:
        return _usable()
    device = tensors[0].device
    for t in tensors:
        if t.dtype not in native.DTYPES:
            return False, f"{str(t.dtype).removeprefix('torch.')} is served by the reference"
        if t.device != device:
            return False, f"the tensors are on {' and '.join(sorted({str(t.device) for t in tensors}))}"
    if op.startswith("attention") and not 16 <= tensors[0].shape[-1] <= 128:
        return False, f"the head size is {tensors[0].shape[-1]}, and the CUDA kernels have tiles for 16 to 128"
    if device.type == "cpu" and _on_cpu():
        return True, ""
    if device.type != "cuda":
        return False, f"the tensors are on {device.type}, and the CUDA kernels run on an NVIDIA GPU"
    return _serves_device(device.index)


def serves(op: str, arguments: Sequence) -> tuple[bool, str]:
    """Serve, of tensors that are served, every call but some convolutions."""
    return _serves_conv2d(*arguments) if op == "conv2d" else (True, "")


def _on_cpu() -> bool:
    return os.environ.get("CMFAST_GPU_ON_CPU") == "1"


def _usable() -> tuple[bool, str]:
    if _on_cpu():
        return True, ""
    if not torch.cuda.is_available():
        return False, "no NVIDIA GPU was found"
    return _serves_device(torch.cuda.current_device())


@functools.cache
def _serves_device(index: int) -> tuple[bool, str]:
    if torch.version.hip is not None:
        return False, "the GPU is AMD's, and the CUDA kernels run on NVIDIA's"
    if not torch.cuda.is_available():  # tensors without memory are traced as on any GPU
        return True, ""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return False, f"the GPU has compute capability {major}.{minor}, and the CUDA kernels need 8.0 or more"
    with torch.cuda.device(index):  # asking makes it the current one
        reason = native.cuda().launchable(index)
    if reason:
        return False, f"the CUDA kernels of this build do not run on the GPU: {reason}"
    return True, ""
