"""What all of `cmfast bench` does with its rows: files, the comparison with an earlier run, and the exit status."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ...benchmarking import comparison
from ...benchmarking.rounds import Row
from ...environment import describe
from ...files import check_writable, whole_file
from ..options import device_of
from ..results import write_csv, write_json

Csv = Annotated[Path | None, typer.Option(help="Write the rows as CSV.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the rows and their rounds as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Write a PNG.")]
Compare = Annotated[
    Path | None,
    typer.Option(help="What --json wrote earlier: a verdict for each row, and exit status 1 where one got slower."),
]
BatchSizes = Annotated[str, typer.Option(help="Batch sizes, separated by commas.")]
Passes = Annotated[int, typer.Option(min=1, help="How often all rows are gone through.")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns of each row a pass.")]

#: Exit status of a run that Ctrl-C ended, as the shell has it.
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a run is written to, and which run it is compared with."""

    csv: Path | None = None
    json: Path | None = None
    plot: Path | None = None
    compare: Path | None = None

    def check(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Find out before long work what could not be written or compared; the earlier run, where there is one."""
        for path in (self.csv, self.json, self.plot):
            if path is not None:
                check_writable(path)
        if self.compare is None:
            return None
        earlier = comparison.read(self.compare)
        comparison.check_comparable(earlier, {"settings": settings, "environment": describe()})
        return earlier


def place_of(device: str | None) -> str:
    """Where to measure, "cpu" or "cuda": the GPU that the option names becomes the current one."""
    place = device_of(device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    return place.type


def run(work: Iterable[str], total: int) -> bool:
    """Do the work, which yields what it has done, with a progress bar; whether Ctrl-C ended it."""
    columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(file=sys.stderr))
    with progress:
        task = progress.add_task("", total=total)
        try:
            for done in work:
                progress.update(task, advance=1, description=done[:40])
        except KeyboardInterrupt:
            return True
    return False


def finish(
    rows: Sequence[Row],
    settings: dict[str, Any],
    files: Files,
    *,
    earlier: dict[str, Any] | None = None,
    interrupted: bool = False,
    draw: Callable[[Path, str], None] | None = None,
) -> None:
    """Write the files, say what is wrong and what changed, and end with the exit status.

    Args:
        rows: what was measured; none where nothing was done.
        settings: of the run.
        files: where it is written to.
        earlier: the run to compare with.
        interrupted: Ctrl-C ended the run.
        draw: writes the PNG to a path, with a caption.

    Raises:
        typer.Exit: with status 130 where the run was interrupted, 1 where a row is wrong or void, or got slower.
    """
    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        if row.problem:
            console.print(f"{' '.join(str(value) for value in row.key.values() if value != '')}: {row.problem}")
    if interrupted:
        console.print("interrupted: these rows are of the rounds that were done")
    if rows:
        _write(rows, settings, files, draw)
    worse = 0
    if earlier is not None and rows:
        found = comparison.compare(earlier, document(rows, settings))
        print_comparison(console, found)
        worse = sum(verdict.is_worse for verdict in found.verdicts)
    wrong = sum(bool(row.problem) for row in rows)
    if interrupted or wrong or worse:
        raise typer.Exit(INTERRUPTED if interrupted else 1)


def document(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file has, as far as a comparison reads it."""
    return {"settings": settings, "environment": describe(), "rows": [entry(row) for row in rows]}


def entry(row: Row) -> dict[str, Any]:
    """A row in JSON: its columns, and what a comparison needs of it; unrounded, so that it is shown again as it was."""
    return {**row.flat(), "key": row.key, "samples": row.samples, "control": row.control}


def _write(
    rows: Sequence[Row], settings: dict[str, Any], files: Files, draw: Callable[[Path, str], None] | None
) -> None:
    if files.csv is not None:
        write_csv(files.csv, [row.flat() for row in rows], settings)
    if files.json is not None:
        write_json(files.json, [entry(row) for row in rows], settings)
    if files.plot is not None and draw is not None:
        draw(files.plot, conditions(settings, describe(), date.today().isoformat()))
    for path in (files.csv, files.json, files.plot):
        if path is not None:
            print(f"wrote {path}")


def conditions(settings: dict[str, Any], facts: dict[str, Any], day: str) -> str:
    """Under which conditions a run was made, for the caption of its picture: two lines.

    Args:
        settings: of the run.
        facts: the machine and the versions, as `describe` gives them.
        day: the date, 2026-01-31.
    """
    isa = (facts["extensions"]["cpu"] or {}).get("isa", "no CPU kernels")
    threads = facts["processor"]["threads"]
    machine = f"{facts['processor']['name']}, {isa}, {threads} thread{'s' if threads > 1 else ''}"
    if settings.get("device") == "cuda":
        machine = "; ".join(facts["gpus"])
    clocks = "; ".join(facts["clocks"].values()) or "clocks not known"
    versions = f"torch {facts['versions']['torch']}, cmfast {facts['commit'] or facts['versions']['cmfast']}"
    shown = ("model", "network", "dtype", "batch_sizes", "rounds", "passes")
    chosen = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in shown if name in settings)
    chosen += ", accelerated" if settings.get("accelerate") else ""
    return f"{machine}, {clocks}; {versions}\n{chosen}; {day}"


def rows_of(document: dict[str, Any]) -> list[Row]:
    """The rows of what --json wrote."""
    rows = []
    for found in document["rows"]:
        nested = ("key", "samples", "control", "problem")
        times = {f"{measure}{end}" for measure in found["samples"] for end in ("_s", "_low_s", "_high_s")}
        facts = {name: value for name, value in found.items() if name not in {*nested, *found["key"], *times}}
        rows.append(Row(found["key"], facts, found["samples"], found["problem"], found["control"]))
    return rows


def show(tables: Iterable[Table], notes: Iterable[str] = (), *, markdown: bool = False) -> None:
    """Print tables and what is to be said of them, to read here or as Markdown."""
    console = Console(highlight=False, soft_wrap=True)
    for i, table in enumerate(tables):
        print(("\n" if i else "") + _markdown(table)) if markdown else console.print(table)
    for note in notes:
        print(f"\n{note}") if markdown else console.print(note)


def _markdown(table: Table) -> str:
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    lines = [
        " | ".join(cell.replace("-\n", "").replace("\n", " ") for cell in row) for row in zip(*columns, strict=True)
    ]
    rule = "|".join("---" if column.justify == "left" else "---:" for column in table.columns)
    return "\n".join((f"{table.title}\n", f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])))


def print_comparison(console: Console, found: comparison.Comparison) -> None:
    """Print the rows whose verdict is not "same", and how many have which."""
    counts: dict[str, int] = {}
    table = Table("row", "", "new / old", "noise up to", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for verdict in found.verdicts:
        if verdict.control:
            continue
        counts[verdict.verdict] = counts.get(verdict.verdict, 0) + 1
        if verdict.verdict not in ("same", "unclear"):
            numbers = ("" if x is None else f"{x:.2f}" for x in (verdict.ratio, verdict.within))
            name = " ".join(str(value) for value in verdict.key.values() if value != "")
            table.add_row(name, verdict.measure, *numbers, verdict.verdict)
    if table.row_count:
        console.print(table)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "no rows"
    console.print(
        f"compared: {said}; the machine took {found.drift:.2f} times as long for what is not cmfast's "
        f"({found.controls} controls, scattered by {found.between:.1%}), and ratios are without that"
    )


def save(figure: Any, path: Path, caption: str) -> None:
    """Write a figure as a PNG with its conditions under it."""
    figure.supxlabel(caption, fontsize=7, x=0.01, ha="left")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Description": caption})
