"""A kernel launch as a value: what runs on a GPU, and what the static report compiles without one."""

import dataclasses
import functools
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    An operator's module has a function that plans its launches from the tensors it is given; the operator runs them,
    and the static report plans the same launches on tensors without memory and compiles them.

    Attributes:
        kernel: the @triton.jit function.
        grid: programs along each axis, up to three.
        args: run-time arguments in the order of the kernel's parameters: tensors, integers, floats, None.
        constants: the tl.constexpr parameters by name.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Launch the kernel on the current stream."""
        self.kernel[self.grid](*self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of the device's architecture, "sm_90" or "gfx942" say; "" where there is no GPU to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def lanes(arch: str) -> int:
    """Threads of a warp: 64 on AMD's CDNA, 32 elsewhere."""
    return 64 if arch.startswith("gfx9") else 32
