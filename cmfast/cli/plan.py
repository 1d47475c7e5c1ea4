"""`cmfast profile --plan`: what a GPU would run for a network evaluation, found without one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.cuda.plan import PlannedLaunch, plan, plan_step
from ..kernels.static import GPUS
from ..profiling.table import table
from .results import write_json
from .user_network import Call

#: Fields of launches that are summed up.
_SUMS = ("flops", "bytes", "floor_seconds")


def print_plan(
    call: Call,
    gpu: str,
    dtype: torch.dtype,
    settings: dict[str, Any],
    json_file: Path | None,
    *,
    depth: int | None,
    sampled: bool,
) -> None:
    """Print a table of the launches, by operator and shape, and write all of them where a file is given.

    `depth` asks for a table by layer as well, by so many parts of their names. `sampled` says that the network's first
    argument is a sample, so that the launch of its consistency step is a part.
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
    if depth is not None:
        print()
        _print_layers(launches, depth)
    if json_file is not None:
        rows = [launch._asdict() for launch in launches]
        write_json(json_file, rows, settings | {"gpu": gpu, "dtype": str(dtype).removeprefix("torch.")}, total)
        print(f"wrote {json_file}")


def _print(launches: Sequence[PlannedLaunch]) -> None:
    kinds: dict[tuple[str, str, str], list[PlannedLaunch]] = {}
    for launch in launches:
        operator = f"{launch.operator} (torch)" if launch.reason else launch.operator
        kinds.setdefault((operator, " x ".join(map(str, launch.shape)), str(launch.programs or "")), []).append(launch)
    rows = [
        [operator, shape, programs, *_sums(kinds[operator, shape, programs])] for operator, shape, programs in kinds
    ]
    _print_longest(["operator", "output", "programs"], rows)


def _print_layers(launches: Sequence[PlannedLaunch], depth: int) -> None:
    layers: dict[str, list[PlannedLaunch]] = {}
    for launch in launches:
        layers.setdefault(".".join(launch.layer.split(".")[:depth]), []).append(launch)
    _print_longest(["layer"], [[layer or "(the network itself)", *_sums(each)] for layer, each in layers.items()])


def _sums(launches: Sequence[PlannedLaunch]) -> list[str]:
    flops, moved, floor = (sum(getattr(launch, name) for launch in launches) for name in _SUMS)
    return [str(len(launches)), f"{flops / 1e9:.2f}", f"{moved / 1e6:.1f}", f"{1e6 * floor:.1f}"]


def _print_longest(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(table([*header, "launches", "GFLOP", "MB", "us"], sorted(rows, key=lambda row: -float(row[-1]))))
