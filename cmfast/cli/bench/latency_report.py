"""How the rows of `cmfast bench latency` are written, shown and drawn."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ...benchmarking.rounds import Row
from ...evaluation.latency import Latency, equal_quality
from ...evaluation.quality import Quality
from . import report

_KEY = ("model", "sampler", "steps", "batch_size")
_NESTED = ("quality", "rounds")


def row_of(latency: Latency) -> Row:
    """As the other measurements have it."""
    key = {name: getattr(latency, name) for name in _KEY}
    names = [field.name for field in dataclasses.fields(Latency)]
    facts = {name: getattr(latency, name) for name in names if name not in (*_KEY, *_NESTED)}
    facts |= latency.quality._asdict() if latency.quality is not None else {}
    facts["seconds_per_sample"] = latency.seconds / latency.batch_size
    return Row(key, facts, {"batch": list(latency.rounds)})


def latency_of(row: Row) -> Latency:
    """What `row_of` was made of; what earlier versions did not measure is left out."""
    names = [field.name for field in dataclasses.fields(Latency) if field.name not in _NESTED]
    found = {**row.key, **row.facts}
    measured = Quality._fields[0] in found
    quality = Quality(*(found[name] for name in Quality._fields)) if measured else None
    given = {name: found[name] for name in names if name in found}
    return Latency(**given, quality=quality, rounds=tuple(row.samples["batch"]))


def kinds(rows: Sequence[Latency]) -> tuple[list[Latency], list[Latency]]:
    """The rows of the consistency model, and those of diffusion sampling."""
    few = [row for row in rows if row.model == "consistency"]
    return few, [row for row in rows if row.model != "consistency"]


def tables(rows: Sequence[Latency]) -> Iterator[Table]:
    """A table a batch size."""
    for size in dict.fromkeys(row.batch_size for row in rows):
        few, many = kinds([row for row in rows if row.batch_size == size])
        yield _table(few, many, size)


def _table(few: Sequence[Latency], many: Sequence[Latency], batch_size: int) -> Table:
    measured = (few[0] if few else many[0]).quality is not None
    title = (
        f"milliseconds for {batch_size} sample{'s' if batch_size > 1 else ''}: median, fastest and slowest of "
        f"{len((few[0] if few else many[0]).rounds)}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("sampler", "steps", "evalu-\nations", "first\nms", "ms", "range", "sam-\nples\nper s"):
        table.add_column(column, justify="left" if column == "sampler" else "right", no_wrap=True)
    if any(row.decoding is not None for row in (*few, *many)):
        table.add_column("decoder\nms", justify="right", no_wrap=True)
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
        if row.decoding is not None:
            cells.append(f"{1e3 * row.decoding:.0f} ({row.decoding / row.seconds:.0%})")
        if row.quality is not None:
            q = row.quality
            cells += [f"{q.accuracy:.3f}", f"{q.frechet_test:.2f}", f"{q.frechet_train:.2f}"]
        table.add_row(*cells, end_section=bool(few) and row is few[-1])
    return table


def notes(rows: Sequence[Latency]) -> Iterator[str]:
    """How many times as fast each consistency row is as the baseline of equal quality, and as heun with 40 steps."""
    for size in dict.fromkeys(row.batch_size for row in rows):
        few, many = kinds([row for row in rows if row.batch_size == size])
        default = next((r for r in many if (r.sampler, r.steps) == ("heun", 40)), None)
        for row in few:
            found = []
            other = equal_quality(row, many)
            if other is not None:
                found.append(
                    f"{other.seconds / row.seconds:.1f}x faster than {other.sampler} {other.steps} "
                    f"({other.evaluations} evaluations), the fastest of at least its quality"
                )
            elif row.quality is not None:
                found.append("no diffusion row is at least as good")
            if default is not None:
                ratio = default.seconds / row.seconds
                found.append(f"{ratio:.1f}x faster than heun 40 ({default.evaluations} evaluations)")
            if found:
                yield f"consistency, {row.steps} step{'s' if row.steps > 1 else ''}: {'; '.join(found)}"


def draw(rows: Sequence[Latency], path: Path, caption: str) -> None:
    """Write a PNG: quality over latency of the first batch size, or latency alone where no quality was measured."""
    if any(row.quality is not None for row in rows):
        few, many = kinds([row for row in rows if row.batch_size == rows[0].batch_size])
        return _plot(few, many, rows[0].batch_size, path, caption)
    _plot_seconds(rows, path, caption)


def _plot(few: Sequence[Latency], many: Sequence[Latency], batch_size: int, path: Path, caption: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

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
    for axis, steps in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    report.save(figure, path, caption)


def _plot_seconds(rows: Sequence[Latency], path: Path, caption: str) -> None:
    """Bars: milliseconds a sample of each sampler and batch size, from the fastest to the slowest batch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(9, 1.6 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = {"consistency": "C0", "diffusion": "C1"}
    for i, row in enumerate(rows):
        median, fast, slow = (1e3 * s / row.batch_size for s in (row.seconds, row.fastest, row.slowest))
        axes.barh(i, median, xerr=[[median - fast], [slow - median]], capsize=2, color=colors[row.model])
        axes.annotate(f" {_digits(median)}", (slow, i), va="center", fontsize=8)
    labels = [
        f"{row.model if row.sampler == 'multistep' else row.sampler}, {row.evaluations} "
        f"evaluation{'s' if row.evaluations > 1 else ''}, batch {row.batch_size}"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds a sample (whiskers: fastest and slowest batch)", fontsize=9)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="x", alpha=0.3)
    report.save(figure, path, caption)


def _digits(number: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _line(axes: Any, rows: Sequence[Latency], label: str, **style: Any) -> None:
    points = [(1e3 * row.seconds, row.quality.frechet_train, row.evaluations) for row in rows if row.quality]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=label, **style)
    for x, y, evaluations in points:
        axes.annotate(str(evaluations), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
