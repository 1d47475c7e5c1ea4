"""The C++ kernels of csrc/cpu: operators and their gradients on CPU tensors, compiled when cmfast was installed.

They exist for AMX, for AVX-512 with and without BF16, for AVX2 and in portable C++; the best that runs here serves, or
the one that the environment variable CMFAST_CPU_ISA names (amx, avx512bf16, avx512, avx2 or portable). Their threads
are torch's: `torch.set_num_threads` governs them.
"""

from collections.abc import Sequence

from torch import Tensor

from .. import native
from .apply_group_norm import apply_group_norm
from .attention import attention, attention_backward
from .channel_norm import channel_norm
from .consistency import consistency_step, consistency_step_backward
from .conv import conv2d
from .group_norm import group_norm, group_norm_backward
from .moments import channel_moments, fold_group_norm
from .timestep_embedding import timestep_embedding

#: The operators that have kernels; each is a function of this module.
_OPERATORS = (
    "group_norm",
    "group_norm_backward",
    "attention",
    "attention_backward",
    "consistency_step",
    "consistency_step_backward",
    "conv2d",
    "channel_moments",
    "fold_group_norm",
    "apply_group_norm",
    "channel_norm",
    "timestep_embedding",
)

#: Of the consistency step: csrc/cpu/tensors.h's MAX_DIMS.
_MAX_DIMS = 16

__all__ = [
    "apply_group_norm",
    "attention",
    "attention_backward",
    "available",
    "channel_moments",
    "channel_norm",
    "consistency_step",
    "consistency_step_backward",
    "conv2d",
    "fold_group_norm",
    "group_norm",
    "group_norm_backward",
    "timestep_embedding",
]


def available(op: str, tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """Serve the operators above for float32, float16 and bfloat16 tensors of the CPU; timesteps may be integers."""
    try:
        unusable = native.cpu().usable()
    except ImportError as error:
        return False, str(error)
    if unusable:
        return False, unusable
    if op not in _OPERATORS:
        return False, f"there is no CPU kernel for {op}"
    for t in tensors:
        if t.dtype not in native.DTYPES and not (op == "timestep_embedding" and t.dtype in native.INTEGERS):
            return False, f"{str(t.dtype).removeprefix('torch.')} is served by the reference"
        if t.ndim > _MAX_DIMS and op.startswith("consistency_step"):
            return False, f"tensors of more than {_MAX_DIMS} dimensions are served by the reference"
        if t.device.type != "cpu":
            return False, f"a tensor is on {t.device.type}, and the CPU kernels serve CPU tensors"
    return True, ""
