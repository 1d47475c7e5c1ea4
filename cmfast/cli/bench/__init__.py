"""`cmfast bench`: measurements, as a table, CSV, JSON and a picture, and their comparison with earlier ones."""

import typer

from . import all, latency, model, operators, show

app = typer.Typer(help="Measure operators, networks and samplers.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure operators, networks and samplers."""


app.command("operators")(operators.operators)
app.command("model")(model.model)
app.command("latency")(latency.latency)
app.command("all")(all.everything)
app.command("show")(show.show)
