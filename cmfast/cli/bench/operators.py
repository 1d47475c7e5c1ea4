"""`cmfast bench operators`: the fused operators at the networks' shapes, beside plain torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from ...benchmarking.devices import device_of
from ...benchmarking.operators import TORCH, Operators
from ...benchmarking.rounds import Row
from ...kernels.backends import BACKENDS, OPERATORS
from ...kernels.shapes import Call, calls
from ..options import Device, Threads, dtype_of, integers
from . import report

#: Bytes above which a call is left out on the CPU, unless it is asked for: the first level of LSUN-256.
_LARGE = 64 << 20
_COLORS = {"cuda": "tab:blue", "triton": "tab:green", "cpu": "tab:blue", "reference": "tab:orange", TORCH: "tab:gray"}


def operators(
    ops: Annotated[str | None, typer.Option(help=f"Some of {', '.join(OPERATORS)}; by default all.")] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(BACKENDS)}; by default those with a kernel for the call, and the reference where "
            "there is none."
        ),
    ] = None,
    batch_sizes: report.BatchSizes = "1",
    large: Annotated[
        bool, typer.Option("--large", help="On the CPU, calls that move more than 64 MiB as well.")
    ] = False,
    passes: report.Passes = 3,
    rounds: report.Rounds = 3,
    csv: report.Csv = None,
    json: report.JsonFile = None,
    plot: report.Plot = None,
    compare: report.Compare = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; by default float32, on a GPU bfloat16.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Time every operator at the networks' shapes on each backend, beside plain torch and what the machine can do."""
    if threads is not None:
        torch.set_num_threads(threads)
    place = report.place_of(device)
    dtype = dtype or ("bfloat16" if place == "cuda" else "float32")
    chosen, left_out = _calls(ops, dtype, integers(batch_sizes, "--batch-sizes") or [], large or place == "cuda")
    names = None if backends is None else _some(backends, BACKENDS, "--backends")
    settings: dict[str, Any] = {"command": "operators", "device": place, "dtype": dtype, "batch_sizes": batch_sizes}
    settings |= {"ops": ops, "backends": backends, "large": large, "passes": passes, "rounds": rounds}
    files = report.Files(csv, json, plot, compare)
    earlier = files.check(settings)
    bench = Operators(chosen, device_of(place), backends=names, rounds=rounds)

    def work() -> Iterator[str]:
        for _ in range(passes):
            yield from bench.measure()

    interrupted = report.run(work(), passes * bench.steps)
    rows = [row for row in bench.ceilings.values() if row.samples] + bench.rows
    report.show(tables(rows), notes(rows, left_out))
    report.finish(
        rows,
        settings,
        files,
        earlier=earlier,
        interrupted=interrupted,
        draw=lambda path, caption: draw(rows, path, caption),
    )


def _calls(ops: str | None, dtype: str, batches: Sequence[int], large: bool) -> tuple[list[Call], int]:
    """The calls to measure, and how many are left out because they are large."""
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch-sizes must be positive, got {','.join(map(str, batches))}")
    wanted = None if ops is None else _some(ops, OPERATORS, "--ops")
    found = [call for batch in batches for call in calls(wanted, dtype_of(dtype), batch)]
    small = [call for call in found if large or _input_bytes(call) <= _LARGE]
    return small, len(found) - len(small)


def _input_bytes(call: Call) -> int:
    from ...benchmarking.calls import tensors

    return sum(t.numel() * t.element_size() for t in tensors(call.arguments))


def _some(text: str, known: Sequence[str], option: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option} must be some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def notes(rows: Sequence[Row], left_out: int = 0) -> Iterator[str]:
    """What the machine can do at most, and which calls were not measured."""
    for row in rows:
        times = row.times("cold") if row.key["op"] == "ceiling" else None
        if times is not None:
            fact, amount = next(iter(row.facts.items()))
            rate = f"{_us(times.median)} us" if fact == "calls" else f"{amount / times.median / 1e9:.1f} "
            unit = {"calls": "", "bytes": "GB/s", "flops": "GFLOP/s"}[fact]
            name = f"{row.key['shape']} {row.key['dtype']}".strip()
            yield f"ceiling: {name} {rate}{unit}"
    if left_out:
        yield f"{left_out} calls of more than 64 MiB were left out: --large measures them"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table an operator."""
    for op in dict.fromkeys(row.key["op"] for row in rows if row.key["op"] != "ceiling"):
        dtypes = " and ".join(dict.fromkeys(row.key["dtype"] for row in rows if row.key["op"] == op))
        table = Table(
            title=f"{op}, {dtypes}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        table.add_column("call", overflow="fold")
        for column in ("backend", "cold us", "quartiles", "warm us", "rate", "share"):
            table.add_column(column, justify="left" if column == "backend" else "right", no_wrap=True)
        last = None
        for row in (row for row in rows if row.key["op"] == op):
            label = _label(row)
            table.add_row("" if label == last else label, row.key["backend"], *_cells(row))
            last = label
        yield table


def _label(row: Row) -> str:
    return " ".join(row.key[name] for name in ("shape", "layout", "form") if row.key[name])


def _cells(row: Row) -> list[str]:
    cold, warm = row.times("cold"), row.times("warm")
    if cold is None:
        return [row.problem.partition(":")[0], "", "", "", ""]
    product = row.key["op"].startswith(("attention", "conv2d"))
    rate = f"{row.facts['gflop_per_s']:.0f} GFLOP/s" if product else f"{row.facts['gb_per_s']:.1f} GB/s"
    share = row.facts.get("share")
    return [
        _us(cold.median),
        f"{_us(cold.low)}–{_us(cold.high)}",
        "" if warm is None else _us(warm.median),
        rate,
        "" if share is None else f"{share:.0%}",
    ]


def _us(seconds: float) -> str:
    """Microseconds, to three digits or more."""
    us = 1e6 * seconds
    return f"{us:.{2 if us < 10 else 1 if us < 100 else 0}f}"


def draw(rows: Sequence[Row], path: Path, caption: str) -> None:
    """Write a PNG: for each call, how many times as fast as plain torch it is, and its share of the ceiling."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.key["op"] != "ceiling" and row.samples:
            grouped.setdefault((row.key["op"], _label(row)), {})[row.key["backend"]] = row
    labels = [f"{op} {label}" for op, label in grouped]
    figure = Figure(figsize=(9, 1.8 + 0.19 * len(labels)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    named: set[str] = set()
    for i, by in enumerate(grouped.values()):
        for backend, row in by.items():
            style: dict[str, Any] = {"color": _COLORS[backend], "marker": "o", "linestyle": "", "markersize": 4}
            label = None if backend in named else ("plain torch" if backend == TORCH else f"cmfast, {backend}")
            named.add(backend)
            if row.facts.get("share") is not None:
                right.plot(row.facts["share"], i, label=label, **style)
            torch_times, times = by[TORCH].times("cold") if TORCH in by else None, row.times("cold")
            if backend != TORCH and torch_times is not None and times is not None:
                left.plot(torch_times.median / times.median, i, **style)
                slow, fast = torch_times.low / times.high, torch_times.high / times.low
                left.plot([slow, fast], [i, i], color=style["color"], linewidth=1)
    left.set_yticks(range(len(labels)), labels, fontsize=6)
    left.set_ylim(len(labels) - 0.5, -0.5)
    left.axvline(1, color="tab:gray", linewidth=1)
    left.set(xscale="log", xlabel="times as fast as plain torch (lines: quartiles)")
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xscale="log", xlabel="share of the measured ceiling, buffers cold")
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(fontsize=7, loc="outside upper right", ncols=3, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelsize=7)
        axes.xaxis.label.set_size(8)
    report.save(figure, path, caption)
