"""`cmfast bench all`: the operators, a model and its latency, each with its files in one folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...files import check_writable
from .. import options
from . import latency, model, operators, report


def everything(
    out: Annotated[Path, typer.Option(help="The folder of operators.*, model.* and latency.*")] = Path("out/bench"),
    compare: Annotated[
        Path | None, typer.Option(help="Such a folder of an earlier run: exit status 1 where something got slower.")
    ] = None,
    peers: Annotated[str | None, typer.Option(help="As for model.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
) -> None:
    """Run operators, model and latency, with CSV, JSON and a PNG of each."""
    common: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
    commands: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
        "operators": (operators.operators, {}),
        "model": (model.model, {"peers": peers, "batch_sizes": "1,16"}),
        "latency": (latency.latency, {}),
    }
    earlier = {name: None if compare is None else compare / f"{name}.json" for name in commands}
    for name, path in earlier.items():
        check_writable(out / f"{name}.json")
        if path is not None and not path.is_file():
            raise ValueError(f"--compare {compare} has no {name}.json: expected the --out of an earlier run")
    status = 0
    for name, (command, arguments) in commands.items():
        files = {kind: out / f"{name}.{end}" for kind, end in (("csv", "csv"), ("json", "json"), ("plot", "png"))}
        try:
            command(**arguments, **common, **files, compare=earlier[name])
        except typer.Exit as ended:
            if ended.exit_code == report.INTERRUPTED:
                raise
            status = max(status, ended.exit_code)
    if status:
        raise typer.Exit(status)
