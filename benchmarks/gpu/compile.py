"""The stage before the kernels are used: those of the accelerated network are compiled, by several processes at once.

Those of its convolutions in other forms come last, as far as the time reaches: see tuning.py.

Triton keeps what it has compiled in a folder, where the stages that follow find it. One process would take a minute.
"""

import functools
import time

import torch
from cmfast.kernels.triton.launch import Launch, architecture
from torch import Tensor

import cmfast
from cmfast.engine.accelerator import accelerator_of
from cmfast.engine.cuda.convolutions import alone, lower_conv2d, without_memory
from cmfast.engine.cuda.forms import candidates
from cmfast.engine.cuda.launches import launch_of

from . import network, stage, tuning

#: Cases, as many as processes: each compiles every SHARES-th kernel.
SHARES = 8


def cases(device, folder, until):
    """A share of the kernels each."""
    for i in range(1 if device.emulated else SHARES):
        work = functools.partial(share, i, device)
        yield stage.Case(f"share {i}", work, patience=120)
    for i in range(1 if device.emulated else SHARES):
        work = functools.partial(share_of_forms, i, device)
        yield stage.Case(f"forms, share {i}", work, patience=120, optional=True)


def share(i: int, device) -> list[dict]:
    """A row a dtype and batch: how many of its kernels were compiled here, of how many, and the seconds."""
    rows = []
    fast = {}
    for dtype, batch in network.evaluations(device):
        start = time.perf_counter()
        if dtype not in fast:
            fast[dtype] = cmfast.accelerate(network.network(device, getattr(torch, dtype)), getattr(torch, dtype))
        accelerator = accelerator_of(fast[dtype])
        assert accelerator is not None
        steps = accelerator.executable(network.inputs(device, batch, getattr(torch, dtype))).steps.steps
        launches = [launch for step in steps if (launch := launch_of(step)) is not None]
        kernels = list({_key(launch): launch for launch in launches}.values())
        for launch in kernels[i::SHARES]:
            warm_up(launch)
        row = {"dtype": dtype, "batch": batch, "compiled": len(kernels[i::SHARES]), "kernels": len(kernels)}
        rows.append({**row, "seconds": round(time.perf_counter() - start, 2)})
    return rows


def share_of_forms(i: int, device) -> list[dict]:
    """A row: how many forms of the first evaluation's convolutions were compiled here, and the seconds."""
    start = time.perf_counter()
    arch = architecture(torch.device(device.name))
    calls = [a for a, backends in tuning.noted(device, 1).convolutions.values() if "triton" in backends]
    found = [(a, form) for a in calls for form in candidates(a, ["triton"], arch)][i::SHARES]
    for a, form in found:
        steps, given = alone(a)
        packed = without_memory(a.weight, a.dtype, form.backend)
        lower_conv2d(form, steps, "conv2d", given, packed, arch)
        for step in steps.steps:
            warm_up(launch_of(step))
    return [{"forms": len(found), "seconds": round(time.perf_counter() - start, 2)}]


def warm_up(launch: Launch) -> None:
    """Compile a launch, and do not make it."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants, **options)


def _key(launch) -> tuple:
    """What Triton compiles a kernel for: constants, dtypes, and which integers are 1 or multiples of 16."""
    arguments = (
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else (a == 1, a % 16 == 0) if type(a) is int else type(a)
        for a in launch.args
    )
    return launch.kernel.__name__, launch.num_warps, str(launch.constants), *arguments


if __name__ == "__main__":
    stage.main("compile", cases)
