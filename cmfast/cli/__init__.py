"""The `cmfast` command."""

import sys
from importlib import metadata
from typing import Annotated

import typer

from ..kernels import BackendError
from . import bench, convert, edit, environment, evaluate, kernels, profile, sample, serve, train

app = typer.Typer(
    name="cmfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("cmfast"))
        raise typer.Exit


@app.callback()
def cmfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """A custom-kernel engine for consistency models: images, audio and video in one or two network evaluations."""


app.command("env")(environment.env)
app.command("sample")(sample.sample)
app.command("serve")(serve.serve)
app.add_typer(edit.app, name="edit")
app.add_typer(bench.app, name="bench")
app.command("convert")(convert.convert)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("profile")(profile.profile)
app.command("kernels")(kernels.kernels)


def main() -> None:
    """Run the command; an error that the user can mend is one line and exit status 2."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, BackendError) and not _is_out_of_memory(error):
            raise
        print(f"cmfast: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that there is too little memory: on the processor torch has no class for it."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OverflowError) and len(error.args) > 1:  # Python gives the number of the system's error first
        return f"a number is too large: {error.args[-1]}"
    return " ".join(str(error).split()) or type(error).__name__
