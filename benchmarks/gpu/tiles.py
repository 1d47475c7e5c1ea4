"""The stage that tries other tiles: each convolution of the network with all of `conv_config.candidates`.

What it finds is what the rule of kernels/triton/conv_config.py should follow. Times are of CUDA graph replays over
buffers that together exceed the L2 cache (cold). Tiles that need more shared memory than there is are left out.
"""

import dataclasses
import functools

import torch
from cmfast.kernels import reference, shapes
from cmfast.kernels.triton import conv, conv_config
from cmfast.kernels.triton.launch import Launch

from cmfast.benchmarking import accuracy
from cmfast.benchmarking.calls import bytes_moved, fields, name

from . import calls, stage

#: Sets of buffers, at most.
MOST = 24


def convolutions(device) -> list[shapes.Call]:
    """The network's convolutions in bfloat16; a small one in the dry run."""
    if device.emulated:
        return [shapes.conv_call(1, 24, 0, 20, 5, 3, torch.bfloat16, "residual moments")]
    return [call for call in shapes.calls(["conv2d"]) if call.dtype == "bfloat16"]


def cases(device, folder, until):
    """A convolution each."""
    for call in convolutions(device):
        yield stage.Case(name(call), functools.partial(measure, call, device), optional=True)


def count(call: shapes.Call) -> int:
    """How many tiles there are to choose from."""
    found: list[int] = []

    def choose(*given):
        found.append(len(conv_config.candidates(*given)))
        return conv_config.configuration(*given)

    conv.plan_conv2d(*call.arguments, choose=choose)
    return found[0]


def planned(given: tuple, i: int) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor], conv_config.Config]:
    """The launches with the candidate i, what they write, and the candidate."""
    chosen: list[conv_config.Config] = []

    def choose(*sizes):
        chosen.append(conv_config.candidates(*sizes)[i])
        return chosen[0]

    return *conv.plan_conv2d(*given, choose=choose), chosen[0]


def measure(call: shapes.Call, device) -> list[dict]:
    """A row for each candidate: its tiles, its error and microseconds; the first is the rule's."""
    first = calls.values(call, device)
    exact = accuracy.outputs(call, reference.conv2d(*accuracy.wide(first)))[0]
    moved = bytes_moved(call, first)
    sets = 1 if device.emulated else min(MOST, max(4, -(-2 * device.cache_bytes // moved)))
    given = [first, *(calls.values(call, device, seed) for seed in range(1, sets))]
    rows = []
    for i in range(count(call)):
        launches, (out, _), config = planned(first, i)
        row = {**fields(call), **dataclasses.asdict(config), "rule": i == 0}
        try:
            _run(launches)
        except Exception as error:
            if "out of resource" not in str(error):
                raise
            rows.append({**row, "left_out": str(error)})
            continue
        off = ((out.double() - exact).norm() / exact.norm()).item()
        if not off < 1e-2:
            rows.append({**row, "error": f"off by {off:.2g} of the norm"})
            continue
        runs = [functools.partial(_run, planned(values, i)[0]) for values in given]
        times = device.replayed(runs)
        rows.append({**row, "relative_error": off, "tile_us": times.median, "low_us": times.low, "high_us": times.high})
    device.free()
    return rows


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


if __name__ == "__main__":
    stage.main("tiles", cases)
