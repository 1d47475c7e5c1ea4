"""The `cmfast` command."""

import sys

import typer

from ..kernels import BackendError
from . import bench, environment, evaluate, sample, train

app = typer.Typer(
    name="cmfast",
    help="A custom-kernel engine for consistency models: images, audio and video in one or two network evaluations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("env")(environment.env)
app.command("sample")(sample.sample)
app.add_typer(bench.app, name="bench")
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)


def main() -> None:
    """Run the command; an error that the user can mend is one line and exit status 2."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError, ImportError, BackendError) as error:
        print(f"cmfast: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
