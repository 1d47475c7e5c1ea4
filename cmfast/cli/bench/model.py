"""`cmfast bench model`: one evaluation of a network, plain, eager and accelerated, and beside other projects."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from ...benchmarking.ceilings import ceilings
from ...benchmarking.devices import device_of
from ...benchmarking.model import VARIANTS, Evaluations
from ...benchmarking.networks import NETWORKS, configuration, random_network
from ...benchmarking.rounds import Row, take_turns
from ...unet import UNet
from .. import options
from ..options import dtype_of, integers, load_model
from . import report

#: The root of a checkout.
_ROOT = Path(__file__).resolve().parents[3]


def model(
    model: options.Model = "digits",
    network: Annotated[
        str | None, typer.Option(help=f"Instead of a model: {' or '.join(NETWORKS)}, with weights drawn at random.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Some of these.")] = ",".join(VARIANTS),
    peers: Annotated[
        str | None,
        typer.Option(
            help="Other projects to measure as well, such as openvino,torch-compile, or all: benchmarks/peers, in a "
            "checkout."
        ),
    ] = None,
    batch_sizes: report.BatchSizes = "1",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each row.")] = 9,
    csv: report.Csv = None,
    json: report.JsonFile = None,
    plot: report.Plot = None,
    compare: report.Compare = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
) -> None:
    """Time one evaluation of a network in plain torch, on cmfast's operators (eager), and accelerated."""
    if threads is not None:
        torch.set_num_threads(threads)
    place, precision = report.place_of(device), dtype_of(dtype)
    batches = integers(batch_sizes, "--batch-sizes") or []
    if min(batches) < 1:
        raise ValueError(f"--batch-sizes must be positive, got {batch_sizes}")
    if peers is not None and variants != ",".join(VARIANTS):
        raise ValueError(f"--variants are measured without --peers, which name their own; got {variants} and {peers}")
    if unknown := [name for name in variants.split(",") if name not in VARIANTS]:
        raise ValueError(f"--variants must be some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    settings: dict[str, Any] = {"command": "model", "device": place, "dtype": dtype, "batch_sizes": batch_sizes}
    settings |= {"network": network or model, "variants": variants, "peers": peers}
    settings |= {"rounds": rounds, "passes": rounds}
    files = report.Files(csv, json, plot, compare)
    earlier = files.check(settings)
    if peers is not None:
        return _with_peers(network or model, dtype, batches, peers, rounds, settings, files, earlier)
    if network is not None:
        unet = random_network(configuration(network), place)
    else:
        loaded = load_model(model, device, "float32").unet
        if not isinstance(loaded, UNet):
            raise ValueError(f"--model {model} is no cmfast.UNet, whose inputs are known")
        unet = loaded.eval().requires_grad_(False)
    bench = Evaluations(
        network or model, unet, device_of(place), precision, batches, variants=variants.split(","), rounds=rounds
    )
    interrupted = report.run(bench.measure(), bench.steps)
    _finish(bench.rows, list(bench.ceilings.values()), settings, files, earlier, interrupted)


def _finish(
    rows: Sequence[Row],
    limits: Sequence[Row],
    settings: dict[str, Any],
    files: report.Files,
    earlier: dict[str, Any] | None,
    interrupted: bool,
) -> None:
    measured = [row for row in rows if row.samples or row.problem or row.facts.get("note")]
    for row in measured:
        times = row.times("evaluation")
        row.facts["samples_per_s"] = None if times is None else row.key["batch"] / times.median
    report.show([table(measured, settings)], notes(measured))
    report.finish(
        [*(row for row in limits if row.samples), *measured],
        settings,
        files,
        earlier=earlier,
        interrupted=interrupted,
        draw=lambda path, caption: draw(measured, settings, path, caption),
    )


def table(rows: Sequence[Row], settings: dict[str, Any]) -> Table:
    """A row a batch size and variant."""
    title = f"one evaluation of {settings['network']}, {settings['dtype']}"
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("variant", "batch", "ms", "quartiles", "samples per s", "error"):
        found.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows:
        times = row.times("evaluation")
        cells = [row.problem.partition(":")[0] or "left out", "", ""]
        if times is not None:
            ms = [1e3 * seconds for seconds in (times.median, times.low, times.high)]
            cells = [f"{ms[0]:.4g}", f"{ms[1]:.4g}–{ms[2]:.4g}", f"{row.facts['samples_per_s']:.3g}"]
        error = row.facts["error"]
        found.add_row(row.key["variant"], str(row.key["batch"]), *cells, "" if error is None else f"{error:.1e}")
    return found


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """Why rows have no times though nothing is wrong, and in which layout plain torch was faster."""
    for row in rows:
        if row.facts.get("layout"):
            yield f"{row.key['variant']}, batch {row.key['batch']}: {row.facts['layout']}, the faster layout"
        if row.facts.get("note") and not row.problem:
            yield f"{row.key['variant']}, batch {row.key['batch']}: {row.facts['note']}"


def draw(rows: Sequence[Row], settings: dict[str, Any], path: Path, caption: str) -> None:
    """Write a PNG: a bar a variant and batch size, milliseconds a sample, with the quartiles."""
    from matplotlib.figure import Figure

    bars = [(row, times) for row in rows if (times := row.times("evaluation")) is not None]
    figure = Figure(figsize=(9, 1.6 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    batches = list(dict.fromkeys(row.key["batch"] for row, _ in bars))
    for i, (row, times) in enumerate(bars):
        per_sample = [1e3 * seconds / row.key["batch"] for seconds in (times.median, times.low, times.high)]
        median, low, high = per_sample
        color = f"C{batches.index(row.key['batch'])}"
        axes.barh(i, median, color=color, xerr=[[median - low], [high - median]], capsize=2)
        axes.annotate(f" {median:.3g}", (high, i), va="center", fontsize=8)
    labels = [f"{row.key['variant']}, batch {row.key['batch']}" for row, _ in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"milliseconds a sample, one evaluation of {settings['network']} (whiskers: quartiles)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    report.save(figure, path, caption)


def _compare_module() -> ModuleType:
    """benchmarks.peers.compare of the checkout; ValueError where cmfast was installed without one."""
    if not (_ROOT / "benchmarks" / "peers" / "compare.py").exists():
        raise ValueError(
            "--peers needs a checkout of cmfast, installed by `pip install -e .`: benchmarks/peers has them"
        )
    sys.path.append(str(_ROOT))
    try:
        return importlib.import_module("benchmarks.peers.compare")
    finally:
        sys.path.remove(str(_ROOT))


def _with_peers(
    name: str,
    dtype: str,
    batches: Sequence[int],
    peers: str,
    rounds: int,
    settings: dict[str, Any],
    files: report.Files,
    earlier: dict[str, Any] | None,
) -> None:
    """The same by the workers of benchmarks/peers: cmfast, accelerated and eager, beside the peers named."""
    compare = _compare_module()
    device = str(settings["device"])
    wanted = compare.peers_of(device) if peers == "all" else ["cmfast", "cmfast-eager", *peers.split(",")]
    if unknown := [peer for peer in wanted if peer not in compare.PEERS]:
        raise ValueError(f"--peers must be some of {', '.join(compare.PEERS)}, or all; got {', '.join(unknown)}")
    if name not in compare.NETWORKS:
        raise ValueError(f"--peers know the networks {', '.join(compare.NETWORKS)}: got {name}")
    short = {"float32": "fp32", "bfloat16": "bf16"}.get(dtype)
    if short is None:
        raise ValueError(f"--peers are measured in float32 or bfloat16, got {dtype}")
    limits: dict[str, Row] = {}
    for _ in range(rounds):
        take_turns(list(ceilings(device_of(device), [dtype], limits)), 1)
    rows: list[Row] = []
    interrupted = False
    for batch in batches:
        case = compare.Case(name, batch, short, torch.get_num_threads(), (_ROOT / "out" / "peers").resolve(), device)
        try:
            found = compare.measure(
                case, list(dict.fromkeys(wanted)), rounds, lambda line: print(line, file=sys.stderr)
            )
        except KeyboardInterrupt as stop:  # in its rounds, or while the peers start
            interrupted = True
            found = [peer for peer in getattr(stop, "rows", ()) if peer["rounds"] or peer["note"]]
        rows += [
            _row_of(peer, {"network": name, "batch": batch, "dtype": dtype}, compare.WRONG[short]) for peer in found
        ]
        if interrupted:
            break
    _finish(rows, list(limits.values()), settings, files, earlier, interrupted)


def _row_of(peer: dict[str, Any], key: dict[str, Any], worst: float) -> Row:
    """The row of a peer; one that is not there, or does not run, has a note and no time.

    cmfast itself has to run, and results that are off by `worst` of the norm or more are wrong.
    """
    facts = {name: peer[name] for name in ("error", "version", "memory", "start", "conversion", "note")}
    samples = {"evaluation": peer["rounds"]} if peer["rounds"] else {}
    error, control = peer["error"], not peer["peer"].startswith("cmfast")
    problem = ""
    if not samples and error and not error < worst:  # or not a number
        problem = f"wrong: off by {error:.2g} of the norm"
    elif not samples and not control:
        problem = peer["note"] or "no time was taken"
    return Row(key | {"variant": peer["peer"]}, facts, samples, problem, control)
