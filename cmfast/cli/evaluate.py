"""`cmfast eval`: measure the quality of a model's samples, and find the best levels of its evaluations."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ..checkpoints import BUNDLED
from ..evaluation.classifier import feature_statistics, in_batches
from ..evaluation.features import Features, load_features
from ..evaluation.levels import sweep
from ..evaluation.measures import Measure, report
from ..evaluation.quality import frechet_distance
from ..files import check_writable
from ..model import ConsistencyModel
from ..preconditioning import EDM
from . import options
from .options import integers, kernels_of, load_model

#: Iterations of the search of each level; two sets of samples are scored in each.
_ITERATIONS = 8


def evaluate(
    model: options.Model = "digits",
    count: options.Count = 1000,
    steps: options.Steps = None,
    timesteps: options.Timesteps = None,
    sampler: options.Sampler = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 250,
    features: Annotated[
        str | None,
        typer.Option(
            help="What is compared: a bundled model's classifier by its name, one that cmfast train wrote, or "
            "inception. MODEL's if bundled, else that of the digits."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Real samples, for precision and recall: as for train, or digits, drums or moving-digits."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of the data's files: train or test; by default test, and a folder of images whole."),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(help="What the model was trained on, for the nearest neighbours: as --data."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=2, help="Of the bootstrap that gives the confidence intervals.")] = 200,
    sweep_steps: Annotated[
        int | None, typer.Option("--sweep", min=2, help="Find the best levels for 2 to so many steps first.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the model with the levels found to this new folder.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = "auto",
    accelerate: options.Accelerate = False,
    as_json: options.Json = False,
) -> None:
    """Measure samples: class accuracy, Fréchet distance, precision and recall, nearest neighbours."""
    if save is not None and sweep_steps is None:
        raise ValueError("--save writes the levels that --sweep finds: give --sweep")
    if sweep_steps is not None and (timesteps is not None or sampler is not None):
        raise ValueError("--sweep finds levels of multistep consistency sampling: leave out --timesteps and --sampler")
    if save is not None:
        if save.exists() and not (save.is_dir() and not any(save.iterdir())):
            raise FileExistsError(f"{save} is there already: give --save a new folder")
        check_writable(save / "config.json" if save.exists() else save)
    if split is not None and data is None:
        raise ValueError("--split is of the files of --data: give --data")
    if count < 2:
        raise ValueError(f"samples are measured by their statistics: --count must be at least 2, got {count}")
    seen = load_features(features or (model if model in BUNDLED else "digits"))
    real, train = _images(data, split), _images(train_data, "train")
    loaded = load_model(model, device, dtype, accelerate, backend)
    seen.of(torch.zeros(1, *loaded.sample_shape))  # or an error, before long work
    for option, images in (("--data", real), ("--train-data", train)):
        if images is not None and images.shape[1:] != loaded.sample_shape:
            raise ValueError(
                f"{option}: the model's samples are {list(loaded.sample_shape)}, the data's {list(images.shape[1:])}"
            )
    with kernels_of(backend):
        if sweep_steps is not None:
            _sweep(loaded, sweep_steps, seen, real, count, seed, batch_size)
            if save is not None:
                original = load_model(model, "cpu", "float32")
                original.recommended_levels = loaded.recommended_levels
                original.save(save)
                print(f"wrote {save}", file=sys.stderr)
        samples = loaded.sample(
            count,
            steps=steps,
            timesteps=integers(timesteps, "--timesteps"),
            sampler=sampler,
            seed=seed,
            batch_size=batch_size,
        ).cpu()
    labels = None if loaded.num_classes is None else torch.arange(count) % loaded.num_classes
    measures = report(samples, labels, seen, real=real, train=train, resamples=resamples)
    if as_json:
        levels = {str(n): list(v) for n, v in loaded.recommended_levels.items()}
        found = [{"name": m.name, **m.value._asdict(), "count": m.count, "real": m.real} for m in measures]
        print(json.dumps({"model": model, "count": count, "features": seen.name, "levels": levels, "measures": found}))
    else:
        Console().print(_table(measures))


def _images(source: str | None, split: str | None) -> Tensor | None:
    """The samples of a data set, of a path or of a bundled model's."""
    from ..training.data import Dataset, has_splits, load_data, load_digits, load_drums, load_moving_digits, scaled

    bundled: dict[str, Callable[[], tuple[Dataset, Dataset]]] = {
        "digits": load_digits,
        "drums": load_drums,
        "moving-digits": load_moving_digits,
    }
    if source is None:
        return None
    if split not in (None, "train", "test"):
        raise ValueError(f"--split must be train or test, got {split}")
    if source in bundled:
        return bundled[source]()[("train", "test").index(split or "test")].images
    return scaled(load_data(source, split=split or ("test" if has_splits(source) else "train")).images)


def _sweep(
    model: ConsistencyModel,
    steps: int,
    features: Features,
    real: Tensor | None,
    count: int,
    seed: int,
    batch_size: int | None,
) -> None:
    """Find the best levels, by the distance to the training set's statistics or to the data, and set them."""
    scheme = model.preconditioning
    if not isinstance(scheme, EDM):
        raise ValueError(f"--sweep searches levels sigma, which {type(scheme).__name__} does not have")
    if features.classifier is not None:
        mean, covariance = features.classifier.statistics("train")
    elif real is not None:
        mean, covariance = feature_statistics(in_batches(features.of, real))
    else:
        raise ValueError("--sweep needs --data: these features have no statistics of real images")

    def score(levels: Sequence[float]) -> float:
        samples = model.sample(count, sigmas=levels, seed=seed, batch_size=batch_size).cpu()
        return frechet_distance(*feature_statistics(in_batches(features.of, samples)), mean, covariance)

    columns = (TextColumn("searching"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=1 + 2 * _ITERATIONS * (steps - 1))

        def progress(levels: Sequence[float], found: float) -> None:
            bar.update(task, advance=1, description=f"{', '.join(f'{level:.3g}' for level in levels)}: {found:.3f}")

        bounds = {"sigma_max": scheme.sigma_max, "sigma_min": scheme.sigma_min}
        for best in sweep(score, steps, **bounds, iterations=_ITERATIONS, progress=progress):
            model.recommended_levels = {**model.recommended_levels, len(best.levels): best.levels}
            text = ", ".join(f"{level:.4g}" for level in best.levels)
            print(f"{len(best.levels)} steps: {text} (distance {best.score:.3f})", file=sys.stderr)


def _table(measures: Sequence[Measure]) -> Table:
    table = Table("measure", "value", "95 % interval", "of", "real images")
    for m in measures:
        interval = f"{m.value.low:.3f} to {m.value.high:.3f}"
        real = "" if m.real is None else f"{m.real:.3f}"
        table.add_row(m.name, f"{m.value.value:.3f}", interval, str(m.count), real)
    return table
