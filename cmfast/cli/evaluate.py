"""`cmfast eval`: measure the quality of a model's samples."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import evaluation
from . import options
from .options import integers, kernels_of, load_model


def evaluate(
    model: options.Model = "digits",
    count: options.Count = 1000,
    steps: options.Steps = None,
    timesteps: options.Timesteps = None,
    sampler: options.Sampler = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 250,
    classifier: Annotated[Path | None, typer.Option(help="The classifier; that of the digits by default.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure class accuracy, and Fréchet distances of a classifier's features to the real test and training sets."""
    judge = evaluation.load_classifier(classifier)
    loaded = load_model(model, device, dtype)
    labels = torch.arange(count) % (loaded.num_classes or 1)
    with kernels_of(backend):
        samples = loaded.sample(
            count,
            class_labels=None if loaded.num_classes is None else labels,
            steps=steps,
            timesteps=integers(timesteps, "--timesteps"),
            sampler=sampler,
            seed=seed,
            batch_size=batch_size,
        )
    quality = evaluation.evaluate(samples, labels, judge)
    if as_json:
        print(json.dumps({"model": model, "count": count, **quality._asdict()}))
        return
    table = Table("samples", "accuracy", "Fréchet to test", "Fréchet to train")
    table.add_row(str(count), f"{quality.accuracy:.3f}", f"{quality.frechet_test:.3f}", f"{quality.frechet_train:.3f}")
    Console().print(table)
