"""`cmfast bench latency`: samplers, by their latency and the quality of what they draw."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ...accelerate import accelerate as accelerated
from ...benchmarking.ceilings import ceilings
from ...benchmarking.devices import device_of
from ...benchmarking.networks import NETWORKS, configuration, random_network
from ...benchmarking.rounds import Row, take_turns
from ...checkpoints import BUNDLED
from ...evaluation import load_classifier
from ...evaluation.latency import Latency, Plan, equal_quality, measure
from ...model import ConsistencyModel
from .. import options
from ..options import dtype_of, integers, kernels_of, load_model
from . import report

#: Networks with random weights: cmfast's own, and Stable Diffusion 1.5's of diffusers.
SD15 = "sd15"
RANDOM = (*NETWORKS, SD15)
#: The diffusion samplers beside which the consistency model is measured.
BASELINES = ("heun", "euler", "dpm2", "dpmpp_2m", "ddim", "ancestral")


def latency(
    model: options.Model = "digits",
    network: Annotated[
        str | None,
        typer.Option(
            help=f"Instead of a model: {', '.join(RANDOM)}, with weights drawn at random: seconds alone, no quality."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The diffusion model; MODEL-teacher if bundled, else the model itself.")
    ] = None,
    consistency_steps: Annotated[str, typer.Option(help="Evaluations of the consistency model.")] = "1,2,4",
    steps: Annotated[
        str | None, typer.Option(help="Steps of each diffusion sampler; 5,10,20,40, and 10 with --network.")
    ] = None,
    samplers: Annotated[
        str | None,
        typer.Option(help=f"The diffusion samplers; {','.join(BASELINES)}. With --network heun, with sd15 none."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 64,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Several batch sizes, separated by commas; with --network 1.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Batches of each, interleaved; 5, with --network 3.")
    ] = None,
    seed: options.Seed = 0,
    classifier: Annotated[Path | None, typer.Option(help="Measures the samples; that of the digits for them.")] = None,
    csv: report.Csv = None,
    json: report.JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of quality over latency; of latency alone with --network.")
    ] = None,
    compare: report.Compare = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    accelerate: options.Accelerate = False,
    threads: options.Threads = None,
) -> None:
    """Time consistency sampling beside diffusion sampling, and measure the quality of both."""
    if threads is not None:
        torch.set_num_threads(threads)
    if network is not None and network not in RANDOM:
        raise ValueError(f"--network must be one of {', '.join(RANDOM)}, got {network}")
    steps = steps or ("5,10,20,40" if network is None else "10")
    samplers = samplers if samplers is not None else _samplers_of(network)
    batches = integers(batch_sizes or ("1" if network else str(batch_size)), "--batch-sizes") or []
    if min(batches) < 1:
        raise ValueError(f"--batch-sizes must be positive, got {batch_sizes}")
    rounds = rounds or (5 if network is None else 3)
    if teacher is None and network is None and f"{model}-teacher" in BUNDLED:
        teacher = f"{model}-teacher"
    settings: dict[str, Any] = {
        "command": "latency",
        "device": report.place_of(device),
        "model": network or model,
        "teacher": teacher,
        "batch_sizes": ",".join(map(str, batches)),
        "rounds": rounds,
        "passes": rounds,
        "seed": seed,
        "dtype": dtype,
        "backend": backend,
        "accelerate": accelerate,
    }
    files = report.Files(csv, json, plot, compare)
    earlier = files.check(settings)
    begin = time.perf_counter()
    student = load_model(model, device, dtype, accelerate, backend) if network is None else _random(network, settings)
    settings["load_s"] = time.perf_counter() - begin
    baseline = student if teacher is None else load_model(teacher, device, dtype, accelerate, backend)
    judge = None
    if network is None and (classifier is not None or model in BUNDLED):
        judge = load_classifier(classifier)
    if judge is None and plot is not None and network is None:
        raise ValueError("--plot shows quality over latency: give --classifier for a model that is not bundled")
    few = [
        Plan("consistency", student, "multistep", n) for n in integers(consistency_steps, "--consistency-steps") or []
    ]
    names = samplers.split(",") if samplers else []
    many = [Plan("diffusion", baseline, s, n) for s in names for n in integers(steps, "--steps") or []]
    limits: dict[str, Row] = {}
    machine = list(ceilings(device_of(settings["device"]), [dtype], limits))
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.completed}/{task.total} batches"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(file=sys.stderr))
    rows: list[Latency] = []
    whole = rounds * len(few + many)
    interrupted = False
    with kernels_of(backend), progress:
        task = progress.add_task("", total=whole * len(batches))

        def show(done: int, total: int) -> None:
            progress.update(task, advance=1)
            if done % len(few + many) == 0:
                take_turns(machine, 1)

        for size in batches:
            try:
                rows += measure(few + many, batch_size=size, rounds=rounds, seed=seed, classifier=judge, progress=show)
            except KeyboardInterrupt:
                interrupted = True
            interrupted |= sum(len(row.rounds) for row in rows) < whole * (1 + batches.index(size))
            if interrupted:
                break
    for size in dict.fromkeys(row.batch_size for row in rows):
        of_few, of_many = _kinds([row for row in rows if row.batch_size == size])
        print_table(of_few, of_many, size, rounds)
    if network is not None:
        print("quality: not measured, since weights drawn at random draw nothing")
    report.finish(
        [*(row for row in limits.values() if row.samples), *map(_row, rows)],
        settings,
        files,
        earlier=earlier,
        interrupted=interrupted,
        draw=lambda path, caption: _draw(rows, path, caption),
    )


def _samplers_of(network: str | None) -> str:
    return ",".join(BASELINES) if network is None else "" if network == SD15 else "heun"


def _random(network: str, settings: dict[str, Any]) -> ConsistencyModel:
    """The model of a network with random weights, accelerated where the settings say so."""
    place, precision = settings["device"], dtype_of(settings["dtype"])
    own = torch.float32 if settings["accelerate"] and place == "cpu" else precision  # of values between layers
    if network == SD15:
        from ...benchmarking.stable_diffusion import latent_consistency_model

        made = latent_consistency_model(place, own)
    else:
        made = ConsistencyModel(random_network(configuration(network), place, own))
    return accelerated(made, precision) if settings["accelerate"] else made


def _kinds(rows: Sequence[Latency]) -> tuple[list[Latency], list[Latency]]:
    """The rows of the consistency model, and those of diffusion sampling."""
    few = [row for row in rows if row.model == "consistency"]
    return few, [row for row in rows if row.model != "consistency"]


def _row(row: Latency) -> Row:
    """As the other measurements have it."""
    key = {name: getattr(row, name) for name in ("model", "sampler", "steps", "batch_size")}
    facts = {name: value for name, value in _flat(row).items() if name not in key}
    facts["seconds_per_sample"] = row.seconds / row.batch_size
    return Row(key, facts, {"batch": list(row.rounds)})


def _draw(rows: Sequence[Latency], path: Path, caption: str) -> None:
    if any(row.quality is not None for row in rows):
        few, many = _kinds([row for row in rows if row.batch_size == rows[0].batch_size])
        return _plot(few, many, rows[0].batch_size, path, caption)
    _plot_seconds(rows, path, caption)


def _flat(row: Latency) -> dict[str, Any]:
    """A row without nesting: the quality's fields beside the others."""
    nested = ("quality", "rounds")
    plain = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in nested}
    return plain | (row.quality._asdict() if row.quality is not None else {})


def print_table(few: Sequence[Latency], many: Sequence[Latency], batch_size: int, rounds: int) -> None:
    """Print all rows, and for each consistency row the baseline of equal quality."""
    console = Console()
    measured = (few[0] if few else many[0]).quality is not None
    title = (
        f"milliseconds for {batch_size} sample{'s' if batch_size > 1 else ''}: median, fastest and slowest of {rounds}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("sampler", "steps", "evalu-\nations", "first\nms", "ms", "range", "samples\nper s"):
        table.add_column(column, justify="left" if column == "sampler" else "right", no_wrap=True)
    for column in ("accu-\nracy", "to\ntest", "to\ntrain") if measured else ():
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*few, *many]:
        cells = [
            row.model if row.sampler == "multistep" else row.sampler,
            str(row.steps),
            str(row.evaluations),
            "" if row.first is None else f"{1e3 * row.first:.0f}",
            f"{1e3 * row.seconds:.0f}",
            f"{1e3 * row.fastest:.0f}–{1e3 * row.slowest:.0f}",
            f"{row.samples_per_second:.{2 if row.samples_per_second < 10 else 0}f}",
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
        if not text.endswith(": "):
            console.print(text.rstrip("; "), highlight=False)


def _plot(few: Sequence[Latency], many: Sequence[Latency], batch_size: int, path: Path, caption: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
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
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    report.save(figure, path, caption)


def _plot_seconds(rows: Sequence[Latency], path: Path, caption: str) -> None:
    """Bars: milliseconds a sample of each sampler and batch size, from the fastest to the slowest batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = {"consistency": "C0", "diffusion": "C1"}
    for i, row in enumerate(rows):
        median, fast, slow = (1e3 * s / row.batch_size for s in (row.seconds, row.fastest, row.slowest))
        axes.barh(i, median, xerr=[[median - fast], [slow - median]], capsize=2, color=colors[row.model])
        axes.annotate(f" {median:.3g}", (slow, i), va="center", fontsize=8)
    labels = [
        f"{row.model if row.sampler == 'multistep' else row.sampler}, {row.evaluations} "
        f"evaluation{'s' if row.evaluations > 1 else ''}, batch {row.batch_size}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds a sample (whiskers: fastest and slowest batch)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    report.save(figure, path, caption)


def _line(axes: Any, rows: Sequence[Latency], label: str, **style: Any) -> None:
    points = [(1e3 * row.seconds, row.quality.frechet_train, row.evaluations) for row in rows if row.quality]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=label, **style)
    for x, y, evaluations in points:
        axes.annotate(str(evaluations), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
