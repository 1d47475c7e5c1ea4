"""A kernel launch as a value: what runs on a GPU, and what the static report compiles without one."""

import dataclasses
import functools
import threading
from typing import Any

import torch

from .. import recorder

#: Held while a kernel is launched: a thread that finds one half loaded by another, which Triton lets it, cannot.
launching = threading.RLock()


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
        """Launch the kernel on the current stream of the tensors' device."""
        device = next((x.get_device() for x in self.args if isinstance(x, torch.Tensor) and x.is_cuda), None)
        if device is None or device == torch._C._cuda_getDevice():
            return self._run()
        with torch.cuda.device(device):  # Triton launches on the current one
            self._run()

    def _run(self) -> None:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if (record := recorder.current()) is None:
            with launching:
                self.kernel[self.grid](*self.args, **self.constants, **options)
        else:  # Triton knows numbers by their exact types
            args = map(recorder.plain, self.args)
            with launching:
                compiled = self.kernel[self.grid](*args, **self.constants, **options)
            self._note(record, compiled)

    def _note(self, record: recorder.Recorder, compiled: Any) -> None:
        """Note the launch of what was compiled for it: None by Triton's interpreter, which launches nothing."""
        if compiled is None:
            return record.fail("a launch was interpreted")
        bound = self.kernel.signature.bind(*self.args, **self.constants)
        bound.apply_defaults()
        given = [record.address(x) if isinstance(x, torch.Tensor) else x for x in bound.arguments.values()]
        grid = (*self.grid, 1, 1)[:3]
        nobody = (None, None, None)  # metadata for whom a launch tells, before it and after it
        record.launched(
            compiled.run, (*grid, recorder.STREAM, compiled.function, compiled.packed_metadata, *nobody, *given)
        )
        record.unless.add(is_told)
        record.unless.add(functools.partial(_has_hooks, self.kernel))


def _has_hooks(kernel: Any) -> bool:
    """Whether a kernel calls somebody before each launch."""
    return bool(kernel.pre_run_hooks)


def is_told() -> bool:
    """Whether Triton tells somebody of its launches, such as its profiler."""
    import triton  # this file is imported where nothing is launched

    run_time = triton.knobs.runtime
    hooks = run_time.launch_enter_hook, run_time.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of the device's architecture, "sm_90" or "gfx942" say; "" where there is no GPU to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def is_amd(arch: str) -> bool:
    """Whether an architecture is AMD's."""
    return arch.startswith("gfx")


def lanes(arch: str) -> int:
    """Threads of a warp: 64 on AMD's CDNA, 32 elsewhere."""
    return 64 if arch.startswith("gfx9") else 32
