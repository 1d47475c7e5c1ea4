"""`cmfast train`: reproduce the bundled models from their recipe."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .options import Threads


def train(
    out: Annotated[Path, typer.Option(help="Folder for the two networks, the classifier and the model card.")],
    recipe: Annotated[str, typer.Option(help="Name of the recipe.")] = "digits",
    threads: Threads = None,
) -> None:
    """Train a diffusion teacher, distil a consistency model from it, and measure both. Takes about half an hour."""
    import torch

    from ..training import recipes

    if recipe not in recipes.RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}: choose one of {', '.join(recipes.RECIPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}")) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, loss="")
            bar.update(tasks[stage], completed=done, loss=f"{loss:.4f}")

        recipes.run(recipes.RECIPES[recipe], out, progress)
    print((out / "README.md").read_text())
