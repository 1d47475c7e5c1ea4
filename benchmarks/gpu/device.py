"""What differs between a GPU and the dry run on a CPU: where tensors are, a call's time, its launches and its memory.

Everything else in the stages is the same for both, except the sizes (`calls.py`, `network.py`).
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast.benchmarking import devices
from cmfast.benchmarking.devices import Times


class Gpu(devices.Gpu):
    """An NVIDIA GPU."""

    emulated = False

    def refusal(self, backend: str) -> str:
        """Why nothing can be asked of the backend here, or nothing."""
        return ""

    def is_broken(self) -> bool:
        """Whether an error of the device has ended this process's use of it."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


class Emulated:
    """The CPU, on which Triton's interpreter and csrc/emulation take the launches. Its times say nothing of a GPU."""

    emulated = True
    name = "cpu"
    cache_bytes = 1 << 16

    def __init__(self, missing: str) -> None:
        self.missing = missing

    def refusal(self, backend: str) -> str:
        """Why nothing can be asked of the backend here, or nothing."""
        return self.missing if backend == "cuda" else ""

    def is_broken(self) -> bool:
        """Never."""
        return False

    def replayed(self, calls: Sequence[Callable]) -> Times:
        """The time of the first of the calls."""
        return self.called(calls[0])

    def called(self, call: Callable, rounds: int = 1) -> Times:
        """The call's time, once."""
        start = time.perf_counter()
        call()
        return Times.of([1e6 * (time.perf_counter() - start)] * 2)

    def launches(self, call: Callable, trace: Path | None = None) -> dict[str, int]:
        """How often a call asks for each operator that is no view."""
        with _Operators() as operators:
            call()
        if trace:
            trace.write_text("{}\n")
        return dict(operators.counts.most_common())

    def peak_memory(self, call: Callable) -> int:
        """Not known."""
        return 0

    def free(self) -> None:
        """Nothing to do."""


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not getattr(operator, "is_view", False):
            self.counts[str(operator)] += 1
        return operator(*args, **kwargs or {})


@contextlib.contextmanager
def chosen(emulate: bool) -> Iterator[Gpu | Emulated]:
    """The device that the stages measure, ready within the `with` block."""
    torch.manual_seed(0)
    if not emulate:
        device = Gpu()
        with torch.cuda.stream(device.stream):
            yield device
        return
    os.environ |= {"TRITON_INTERPRET": "1", "CMFAST_GPU_ON_CPU": "1"}
    torch.set_num_threads(1)
    from cmfast.kernels import native
    from cmfast.kernels.triton import conv_config

    from tests.interpreter import make_faster
    from tests.kernels import emulation

    make_faster()
    conv_config.PROGRAMS = 2  # the interpreter runs them one by one
    missing = emulation.missing()
    with contextlib.nullcontext() if missing else native.stand_in(emulation.emulated()):
        yield Emulated(missing)
