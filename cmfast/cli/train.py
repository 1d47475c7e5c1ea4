"""`cmfast train`: train a model by any method on any data, or reproduce the bundled models from their recipe."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .options import Device, Threads, device_of


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the trained models.")],
    method: Annotated[str | None, typer.Option(help="Name of the method, such as diffusion or distillation.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of images (a class a sub-folder), a .npz file, or IDX files.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML: network, preconditioning, method, loop, data.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Start from a model: a bundled name, a folder, a .pt file, or a hub id.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A diffusion model that the method learns from.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Cut images to squares and resize them to it.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="A value of the configuration: loop.iterations=1000. Repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the folder.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="Instead of a method: a recipe, one of digits, fashion, drums, moving-digits."),
    ] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train a model. Under torchrun (torchrun --no-python cmfast train ...) each process takes its share of a batch.

    Recipes are trained by one process, on the processor.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    path = None if data is None else str(data)
    named = {"method.name": method, "data.path": path, "data.size": size, "init_from": init_from, "teacher": teacher}
    values = {name: value for name, value in named.items() if value is not None}
    if recipe is not None:
        if set(values) - {"data.path"} or config is not None or assignments or device is not None:
            raise ValueError("--recipe says everything: only --out, --data, --resume and --threads go with it")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--recipe is trained by one process: start it without torchrun")
        _train_recipe(recipe, out, data, resume)
    elif values or config is not None:
        from ..training.configuration import assignment

        values |= dict(assignment(text) for text in assignments or [])
        _train_method(out, config, values, resume, device)
    else:
        raise ValueError("nothing to train: give --method and --data, --config, or --recipe digits")


def _train_method(out: Path, config: Path | None, values: Mapping[str, Any], resume: bool, device: str | None) -> None:
    from ..training import configuration, configured, loop
    from ..training.data import fingerprint, load_data
    from ..training.distributed import Processes, process_group

    content = configuration.read(config) if config is not None else {}
    c = configuration.parse(configuration.set_values(content, values))
    with process_group(device_of(device)) as place:
        first = Processes.current().rank == 0
        with _bar(shown=first) as (bar, progress):
            say: Callable[[str], None] = _silent
            if first:
                say = functools.partial(bar.console.print, markup=False, highlight=False, soft_wrap=True)
            images = load_data(c.data.path, split=c.data.split, size=c.data.size, say=say)
            made = configured.make(c, images, place)
            taught = getattr(made.method, "teacher", None)
            description = {} if taught is None else {"teacher": fingerprint(taught.parameters())}
            if c.init_from is not None:
                description["init_from"] = fingerprint(made.method.model.parameters())
            trained = loop.train(
                made.method,
                images,
                c.loop,
                out=out,
                resume=resume,
                config=configuration.text(made.configuration),
                description=description,
                progress=lambda i, loss: progress("training", i + 1, c.loop.iterations, loss),
                say=say,
            )
        if first:
            for name, model in {"model": trained.model, **trained.averages}.items():
                model.save(out / name)
            print(f"{out}: {', '.join(['model', *trained.averages])} after {c.loop.iterations} updates")


def _train_recipe(recipe: str, out: Path, data: Path | None, resume: bool) -> None:
    from ..training import recipes

    if recipe not in recipes.RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: choose one of {', '.join(recipes.RECIPES)}")
    with _bar() as (bar, progress):
        say = functools.partial(bar.console.print, markup=False, highlight=False, soft_wrap=True)
        recipes.run(recipes.RECIPES[recipe], out, data, resume=resume, progress=progress, say=say)
    print((out / recipe / "README.md").read_text())


@contextlib.contextmanager
def _bar(shown: bool = True) -> Iterator[tuple[Progress, Callable[[str, int, int, float], None]]]:
    """A bar for each stage, and the function that moves it: (stage, done, total, loss)."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, *times, disable=not shown) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, loss="")
            bar.update(tasks[stage], completed=done, loss=f"{loss:.4f}")

        yield bar, progress


def _silent(line: str) -> None:
    pass
