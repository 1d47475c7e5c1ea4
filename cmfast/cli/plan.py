"""`cmfast profile --plan`: what a GPU would run for a network evaluation, found without one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..engine.cuda.plan import PlannedLaunch, plan, plan_step
from ..kernels.static import GPUS
from .results import write_json
from .user_network import Call


def print_plan(
    call: Call, gpu: str, dtype: torch.dtype, settings: dict[str, Any], json_file: Path | None, *, sampled: bool
) -> None:
    """Print a table of the launches, by operator and shape, and write all of them where a file is given.

    `sampled` says that the network's first argument is a sample, so that the launch of its consistency step is a part.
    """
    if gpu not in GPUS:
        raise ValueError(f"--plan must be one of {', '.join(GPUS)}, got {gpu}")
    launches = plan(call.network, call.args, call.kwargs, dtype=dtype, gpu=gpu)
    if sampled:
        launches.append(plan_step(call.args[0], dtype=dtype, gpu=gpu))
    total = {
        "launches": len(launches),
        "flops": sum(launch.flops for launch in launches),
        "bytes": sum(launch.bytes for launch in launches),
        "floor_seconds": sum(launch.floor_seconds for launch in launches),
    }
    print(
        f"{settings['network']} on {gpu}, {str(dtype).removeprefix('torch.')}: {total['launches']} launches, "
        f"{total['flops'] / 1e9:.1f} GFLOP, {total['bytes'] / 1e6:.1f} MB, "
        f"no less than {1e6 * total['floor_seconds']:.1f} us"
    )
    _print(launches)
    if json_file is not None:
        rows = [launch._asdict() for launch in launches]
        write_json(json_file, rows, settings | {"gpu": gpu, "dtype": str(dtype).removeprefix("torch.")}, total)
        print(f"wrote {json_file}")


def _print(launches: Sequence[PlannedLaunch]) -> None:
    kinds: dict[tuple[str, str, int], list[PlannedLaunch]] = {}
    for launch in launches:
        operator = f"{launch.operator} (torch)" if launch.reason else launch.operator
        kinds.setdefault((operator, " x ".join(map(str, launch.shape)), launch.programs), []).append(launch)
    table = Table("operator", "output", "launches", "programs", "GFLOP", "MB", "us", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    floors = {kind: sum(launch.floor_seconds for launch in each) for kind, each in kinds.items()}
    for kind in sorted(kinds, key=floors.__getitem__, reverse=True):
        operator, shape, programs = kind
        each = kinds[kind]
        flops, moved = (sum(getattr(launch, name) for launch in each) for name in ("flops", "bytes"))
        numbers = f"{flops / 1e9:.2f}", f"{moved / 1e6:.1f}", f"{1e6 * floors[kind]:.1f}"
        table.add_row(operator, shape, str(len(each)), str(programs or ""), *numbers)
    Console().print(table)
