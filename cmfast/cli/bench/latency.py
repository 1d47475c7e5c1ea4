"""`cmfast bench latency`: samplers, by their latency and the quality of what they draw."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ...checkpoints import BUNDLED
from ...evaluation import load_classifier
from ...evaluation.latency import Latency, Plan, equal_quality, measure
from ...files import check_writable, whole_file
from .. import options
from ..options import integers, kernels_of, load_model
from ..results import write_csv, write_json

#: The diffusion samplers beside which the consistency model is measured.
BASELINES = ("heun", "euler", "dpm2", "dpmpp_2m", "ddim", "ancestral")


def latency(
    model: options.Model = "digits",
    teacher: Annotated[
        str | None, typer.Option(help="The diffusion model; MODEL-teacher if bundled, else the model itself.")
    ] = None,
    consistency_steps: Annotated[str, typer.Option(help="Evaluations of the consistency model.")] = "1,2,4",
    steps: Annotated[str, typer.Option(help="Steps of each diffusion sampler.")] = "5,10,20,40",
    samplers: Annotated[str, typer.Option(help="The diffusion samplers.")] = ",".join(BASELINES),
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Batches of each, interleaved.")] = 5,
    seed: options.Seed = 0,
    classifier: Annotated[Path | None, typer.Option(help="Measures the samples; that of the digits for them.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of quality over latency.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    accelerate: options.Accelerate = False,
    threads: options.Threads = None,
) -> None:
    """Time consistency sampling beside diffusion sampling, and measure the quality of both."""
    for path in (csv, json, plot):
        if path is not None:
            check_writable(path)
    if threads is not None:
        torch.set_num_threads(threads)
    student = load_model(model, device, dtype, accelerate)
    if teacher is None and f"{model}-teacher" in BUNDLED:
        teacher = f"{model}-teacher"
    baseline = student if teacher is None else load_model(teacher, device, dtype, accelerate)
    judge = load_classifier(classifier) if classifier is not None or model in BUNDLED else None
    if judge is None and plot is not None:
        raise ValueError("--plot shows quality over latency: give --classifier for a model that is not bundled")
    few = [
        Plan("consistency", student, "multistep", n) for n in integers(consistency_steps, "--consistency-steps") or []
    ]
    many = [Plan("diffusion", baseline, s, n) for s in samplers.split(",") for n in integers(steps, "--steps") or []]
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.completed}/{task.total} batches"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(file=sys.stderr))
    with kernels_of(backend, accelerate), progress:
        task = progress.add_task("", total=rounds * len(few + many))
        rows = measure(
            few + many,
            batch_size=batch_size,
            rounds=rounds,
            seed=seed,
            classifier=judge,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print_table(rows[: len(few)], rows[len(few) :], batch_size, rounds)
    flat = [_flat(row) for row in rows]
    settings = {
        "model": model,
        "teacher": teacher,
        "batch_size": batch_size,
        "rounds": rounds,
        "seed": seed,
        "dtype": dtype,
        "backend": backend,
        "accelerate": accelerate,
    }
    if csv is not None:
        write_csv(csv, flat)
    if json is not None:
        write_json(json, flat, settings)
    if plot is not None:
        _plot(rows[: len(few)], rows[len(few) :], batch_size, plot)
    for path in (csv, json, plot):
        if path is not None:
            print(f"wrote {path}")


def _flat(row: Latency) -> dict[str, Any]:
    """A row without nesting: the quality's fields beside the others."""
    plain = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "quality"}
    return plain | (row.quality._asdict() if row.quality is not None else {})


def print_table(few: Sequence[Latency], many: Sequence[Latency], batch_size: int, rounds: int) -> None:
    """Print all rows, and for each consistency row the baseline of equal quality."""
    console = Console()
    measured = (few[0] if few else many[0]).quality is not None
    title = f"milliseconds for {batch_size} samples: median, fastest and slowest of {rounds}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("sampler", "steps", "evalu-\nations", "ms", "range", "samples\nper s"):
        table.add_column(column, justify="left" if column == "sampler" else "right", no_wrap=True)
    for column in ("accu-\nracy", "to\ntest", "to\ntrain") if measured else ():
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*few, *many]:
        cells = [
            row.model if row.sampler == "multistep" else row.sampler,
            str(row.steps),
            str(row.evaluations),
            f"{1e3 * row.seconds:.0f}",
            f"{1e3 * row.fastest:.0f}–{1e3 * row.slowest:.0f}",
            f"{row.samples_per_second:.0f}",
        ]
        if row.quality is not None:
            q = row.quality
            cells += [f"{q.accuracy:.3f}", f"{q.frechet_test:.2f}", f"{q.frechet_train:.2f}"]
        table.add_row(*cells, end_section=bool(few) and row is few[-1])
    console.print(table)
    default = next((r for r in many if (r.sampler, r.steps) == ("heun", 40)), None)
    for row in few:
        other = equal_quality(row, many)
        text = f"consistency, {row.steps} step{'s' if row.steps > 1 else ''}: "
        if other is not None:
            ratio = other.seconds / row.seconds
            text += f"{ratio:.1f}x faster than {other.sampler} {other.steps} ({other.evaluations} evaluations)"
            text += ", the fastest of at least its quality; "
        elif measured:
            text += "no diffusion row is at least as good; "
        if default is not None:
            text += f"{default.seconds / row.seconds:.1f}x faster than heun 40 ({default.evaluations} evaluations)"
        console.print(text.rstrip("; "), highlight=False)


def _plot(few: Sequence[Latency], many: Sequence[Latency], batch_size: int, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for name in dict.fromkeys(row.sampler for row in many):
        _line(axes, [row for row in many if row.sampler == name], f"diffusion, {name}", marker="o", linewidth=1)
    _line(axes, few, "consistency", marker="D", linewidth=2.5, color="black")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"milliseconds for {batch_size} samples (numbers: network evaluations)",
        ylabel="Fréchet distance to the training set",
    )
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _line(axes: Any, rows: Sequence[Latency], label: str, **style: Any) -> None:
    points = [(1e3 * row.seconds, row.quality.frechet_train, row.evaluations) for row in rows if row.quality]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=label, **style)
    for x, y, evaluations in points:
        axes.annotate(str(evaluations), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
