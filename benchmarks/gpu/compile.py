"""The stage before the kernels are used: those of the accelerated network are compiled, by several processes at once.

Those of its convolutions with other tiles come last, as far as the time reaches: see tiles.py.

Triton keeps what it has compiled in a folder, where the stages that follow find it. One process would take a minute.
"""

import functools
import time

import torch
from cmfast.kernels.triton.launch import Launch
from torch import Tensor

import cmfast
from cmfast.engine.accelerator import accelerator_of

from . import calls, network, stage, tiles

#: Cases, as many as processes: each compiles every SHARES-th kernel.
SHARES = 8


def cases(device, folder, until):
    """A share of the kernels each."""
    for i in range(1 if device.emulated else SHARES):
        work = functools.partial(share, i, device)
        yield stage.Case(f"share {i}", work, patience=120)
    for i in range(1 if device.emulated else SHARES):
        work = functools.partial(share_of_tiles, i, device)
        yield stage.Case(f"tiles, share {i}", work, patience=120, optional=True)


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
        launches = [step.call.args[0] for step in steps if not step.reason and getattr(step.call, "args", None)]
        kernels = list({_key(launch): launch for launch in launches}.values())
        for launch in kernels[i::SHARES]:
            warm_up(launch)
        row = {"dtype": dtype, "batch": batch, "compiled": len(kernels[i::SHARES]), "kernels": len(kernels)}
        rows.append({**row, "seconds": round(time.perf_counter() - start, 2)})
    return rows


def share_of_tiles(i: int, device) -> list[dict]:
    """A row: how many launches of convolutions with other tiles were compiled here, and the seconds."""
    start = time.perf_counter()
    found = [(call, tile) for call in tiles.convolutions(device) for tile in range(tiles.count(call))][i::SHARES]
    for call, tile in found:
        for launch in tiles.planned(calls.values(call, device), tile)[0]:
            warm_up(launch)
    return [{"tiles": len(found), "seconds": round(time.perf_counter() - start, 2)}]


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
