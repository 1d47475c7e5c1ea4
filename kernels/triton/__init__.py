"""The Triton kernels: NVIDIA GPUs from Ampere on, and AMD's CDNA3.

CPU tensors are served only where CMFAST_GPU_ON_CPU=1 says that Triton's interpreter (TRITON_INTERPRET=1) or a
simulator takes the launches.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native
from .conv_refusal import refusal

#: Of the kernels: to be raised with changes of them after which earlier measurements say nothing.
VERSION = 1
#: Dtypes of what the kernels read: images, and timesteps that are counted.
_DTYPES = {*native.DTYPES, *native.INTEGERS}
#: Which module of this package has an operator.
_MODULES = {
    "group_norm": "group_norm",
    "group_norm_backward": "group_norm",
    "attention": "attention",
    "attention_backward": "attention",
    "channel_norm": "channel_norm",
    "channel_moments": "moments",
    "fold_group_norm": "moments",
    "apply_group_norm": "apply_group_norm",
    "consistency_step": "consistency",
    "consistency_step_backward": "consistency",
    "conv2d": "conv",
    "timestep_embedding": "timestep_embedding",
}


def available(op: str, tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """Serve float32, float16 and bfloat16 tensors of a GPU that Triton knows; for those without data, plan launches."""
    if not _installed():
        return False, 'the package triton is not installed: pip install "cmfast[triton]"'
    if op not in _MODULES:
        return False, f"there is no Triton kernel for {op}"
    on_cpu = os.environ.get("CMFAST_GPU_ON_CPU") == "1"
    if not tensors:
        usable = torch.cuda.is_available() or on_cpu
        return usable, "" if usable else "no NVIDIA or AMD GPU was found"
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return False, f"the tensors are on {' and '.join(sorted(map(str, devices)))}"
    kind = next(iter(devices)).type
    if kind not in ("cuda", "meta") and not (kind == "cpu" and on_cpu):
        return False, f"the tensors are on {kind}, and Triton runs on a GPU"
    if op.startswith("attention") and not 16 <= tensors[0].shape[-1] <= 128:
        return False, f"the head size is {tensors[0].shape[-1]}, and the Triton kernels have tiles for 16 to 128"
    if others := {t.dtype for t in tensors} - _DTYPES:
        return False, f"{str(others.pop()).removeprefix('torch.')} is served by the reference"
    return True, ""


def serves(op: str, arguments: Sequence) -> tuple[bool, str]:
    """Serve, of tensors that are served, every call but convolutions of too large images."""
    refused = refusal(*arguments) if op == "conv2d" else ""
    return not refused, refused


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def __getattr__(op: str) -> Callable:
    # The kernels import triton, which takes a while: only when one is called.
    if op in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[op]}", __name__), op)
    raise AttributeError(op)
