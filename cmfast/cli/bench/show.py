"""`cmfast bench show`: the table, the Markdown or the picture of what was measured earlier."""

from pathlib import Path
from typing import Annotated

import typer

from ...benchmarking import comparison
from ...files import check_writable
from . import latency_report, model, operators, report


def show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What --json of bench wrote.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    plot: report.Plot = None,
) -> None:
    """Show a JSON file of an earlier run as the run itself did."""
    document = comparison.read(path)
    if plot is not None:
        check_writable(plot)
    settings, rows = document["settings"], report.rows_of(document)
    measured = [row for row in rows if row.key.get("op") != "ceiling"]
    caption = report.conditions(settings, document["environment"], document["date"][:10])
    if settings["command"] == "operators":
        report.show(operators.tables(rows), [*operators.notes(rows), caption], markdown=markdown)
        if plot is not None:
            operators.draw(rows, plot, caption)
    elif settings["command"] == "model":
        report.show([model.table(measured, settings)], [*model.notes(measured), caption], markdown=markdown)
        if plot is not None:
            model.draw(measured, settings, plot, caption)
    else:
        latencies = [latency_report.latency_of(row) for row in measured]
        said = [*latency_report.notes(latencies), caption]
        report.show(latency_report.tables(latencies), said, markdown=markdown)
        if plot is not None:
            latency_report.draw(latencies, plot, caption)
    if plot is not None:
        print(f"wrote {plot}")
