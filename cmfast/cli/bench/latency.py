"""`cmfast bench latency`: samplers, by their latency and the quality of what they draw."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ...accelerate import accelerate as accelerated
from ...benchmarking.ceilings import ceilings
from ...benchmarking.devices import device_of
from ...benchmarking.networks import NETWORKS, configuration, random_network
from ...benchmarking.rounds import Row, take_turns
from ...checkpoints import BUNDLED
from ...evaluation import load_classifier
from ...evaluation.latency import Latency, Plan, measure
from ...model import ConsistencyModel
from .. import options
from ..options import dtype_of, integers, kernels_of, load_model
from . import latency_report, report

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
        int | None, typer.Option(min=1, help="Batches of each, interleaved; 5, with --network 4.")
    ] = None,
    seed: options.Seed = 0,
    classifier: Annotated[str | None, typer.Option(help="Measures the samples; of a bundled MODEL its own.")] = None,
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
    rounds = rounds or (5 if network is None else 4)
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
    decoder = _decoder(settings) if network == SD15 else None
    settings["load_s"] = time.perf_counter() - begin
    baseline = student if teacher is None else load_model(teacher, device, dtype, accelerate, backend)
    judge = None
    if network is None and (classifier is not None or model in BUNDLED):
        judge = load_classifier(classifier or model)
    if judge is not None and rounds * min(batches) < 2:
        raise ValueError(
            f"quality is measured of two samples at least: --rounds {rounds} of --batch-sizes {min(batches)}"
        )
    if judge is None and plot is not None and network is None:
        raise ValueError("--plot shows quality over latency: give --classifier for a model that is not bundled")
    few = [
        Plan("consistency", student, "multistep", n, decoder)
        for n in integers(consistency_steps, "--consistency-steps") or []
    ]
    names = samplers.split(",") if samplers else []
    many = [Plan("diffusion", baseline, s, n, decoder) for s in names for n in integers(steps, "--steps") or []]
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
    report.show(latency_report.tables(rows), latency_report.notes(rows))
    if network is not None:
        print("quality: not measured, since weights drawn at random draw nothing")
    report.finish(
        [*(row for row in limits.values() if row.samples), *map(latency_report.row_of, rows)],
        settings,
        files,
        earlier=earlier,
        interrupted=interrupted,
        draw=lambda path, caption: latency_report.draw(rows, path, caption),
    )


def _samplers_of(network: str | None) -> str:
    return ",".join(BASELINES) if network is None else "" if network == SD15 else "heun"


def _random(network: str, settings: dict[str, Any]) -> ConsistencyModel:
    """The model of a network with random weights, accelerated where the settings say so."""
    place, precision, own = _precision(settings)
    if network == SD15:
        from ...benchmarking.stable_diffusion import latent_consistency_model

        made = latent_consistency_model(place, own)
    else:
        made = ConsistencyModel(random_network(configuration(network), place, own))
    return accelerated(made, precision) if settings["accelerate"] else made


def _decoder(settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Stable Diffusion's decoder of latents, accelerated where the settings say so."""
    from ...benchmarking.stable_diffusion import decoder

    place, precision, own = _precision(settings)
    made = decoder(place, own)
    fast = accelerated(made, precision) if settings["accelerate"] else made
    return lambda latents: fast(latents.to(own))


def _precision(settings: dict[str, Any]) -> tuple[str, torch.dtype, torch.dtype]:
    """The device, the dtype of products, and that of values between layers."""
    place, precision = settings["device"], dtype_of(settings["dtype"])
    return place, precision, torch.float32 if settings["accelerate"] and place == "cpu" else precision
