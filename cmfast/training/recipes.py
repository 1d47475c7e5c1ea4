"""Recipes: everything from data to the bundled models, with fixed seeds and iteration counts."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..environment import processor
from ..evaluation.classifier import Classifier, load_classifier, save_classifier
from ..evaluation.quality import evaluate, nearest_distance
from ..files import check_writable, whole_file
from ..model import ConsistencyModel, load
from ..storage import save
from ..unet import UNet
from .card import Measured, model_card
from .classifier import train_classifier
from .configured import frozen
from .data import Dataset, fingerprint
from .digits_recipe import DIGITS
from .drums_recipe import DRUMS
from .fashion_recipe import FASHION
from .loop import train
from .methods import METHODS
from .moving_digits_recipe import MOVING_DIGITS
from .recipe import Recipe, Stage
from .run_folder import check_new

#: Called with (stage, iterations done, iterations, loss).
Progress = Callable[[str, int, int, float], None]

#: Of the classifier that measures, and has no part in what is chosen; and of that whose layers a loss compares.
SECOND_SEED, FEATURES_SEED = 1, 2


RECIPES = {recipe.name: recipe for recipe in (DIGITS, FASHION, DRUMS, MOVING_DIGITS)}


def run(
    recipe: Recipe,
    out: str | Path,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Train everything of a recipe, write it to the folder `out` with a model card, and return what was measured.

    Args:
        recipe: what to train.
        out: folder of the models, each a folder, and the classifier; the student's has the card. Checkpoints and logs
            of both trainings are in `runs/` there, and the classifier that is the `features` of a method's settings,
            under the name that they have for it.
        folder: where the data is, for recipes that do not bring it.
        resume: take what is in `out` already, and go on from the last checkpoint.
        progress: called with (stage, updates done, updates, loss).
        say: told in a line each what happens.

    Returns:
        Rows (sampler, evaluations, quality, mean distance to the nearest training image), as the card has them.

    Raises:
        ValueError: data that the recipe needs and was not given, or the other way round.
        FileExistsError: `out` has checkpoints, and `resume` is False.
        OSError: the folder cannot be written to (found out before training).
    """
    out = Path(out)
    data, test = recipe.load(folder)
    card = out / recipe.name / "README.md"
    check_writable(card)
    if not resume:
        for name in ("teacher", "student"):
            check_new(out / "runs" / name)

    def stage(name: str, total: int) -> Callable[[int, float], None] | None:
        return None if progress is None else lambda i, loss: progress(name, i + 1, total, loss)

    def classifier(name: str, path: Path, seed: int) -> None:
        if not (resume and path.exists()):
            total = recipe.classifier_iterations
            made = train_classifier(data, test, iterations=total, seed=seed, progress=stage(name, total))
            path.parent.mkdir(exist_ok=True)
            save_classifier(made, path)

    def trained(name: str, source: ConsistencyModel, teacher: ConsistencyModel | None = None) -> ConsistencyModel:
        part: Stage = getattr(recipe, name)
        file = getattr(part.settings, "features", None)
        if file is not None:
            classifier("features", out / "runs" / file, FEATURES_SEED)
            settings = dataclasses.replace(part.settings, features=str(out / "runs" / file))
            part = dataclasses.replace(part, settings=settings)
        report = stage(name, part.loop.iterations)
        return train_stage(part, source, data, teacher, report, out=out / "runs" / name, resume=resume, say=say)

    classifier("classifier", out / f"{recipe.name}-classifier.safetensors", seed=0)
    teacher_folder = out / f"{recipe.name}-teacher"
    if not (resume and (teacher_folder / "config.json").exists()):
        torch.manual_seed(recipe.teacher.loop.seed)
        new = ConsistencyModel(UNet(recipe.unet), recipe.preconditioning, representation=recipe.representation)
        save(trained("teacher", new), teacher_folder, dtype=torch.float16)
    teacher = load(teacher_folder)  # as it is stored: what the student learns from can be looked at
    if not (resume and (out / recipe.name / "config.json").exists()):
        student = trained("student", teacher, teacher)
        student.recommended_levels = dict(recipe.recommended_levels)
        save(student, out / recipe.name, dtype=torch.float16)

    rows = measure(recipe, out, data, test)
    with whole_file(card) as file:
        file.write_text(model_card(recipe, rows, data, test, _made(recipe, out)))
    return rows


def _made(recipe: Recipe, out: Path) -> str:
    """How long the trainings took, as their logs have it, and where."""
    took = {name: _took(out / "runs" / name / "log.csv", getattr(recipe, name)) for name in ("teacher", "student")}
    threads = torch.get_num_threads()
    return (
        f"The teacher took {took['teacher']} and the student {took['student']}, by {threads} "
        f"thread{'s' if threads > 1 else ''} of {processor()}, with torch {torch.__version__}; seeds "
        f"{recipe.teacher.loop.seed} and {recipe.student.loop.seed}."
    )


def _took(path: Path, stage: Stage) -> str:
    """How long a training took, by its log."""
    if not path.exists():  # a model was there already
        return "a time that no log tells"
    with path.open(newline="") as log:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(log)]
    batch, done = stage.loop.batch_size, [0.0, *(row["iteration"] for row in rows)]
    seconds = (batch * (i - j) / row["samples_per_second"] for i, j, row in zip(done[1:], done, rows, strict=False))
    return f"{sum(seconds) / 60:.1f} minutes"


def train_stage(
    stage: Stage,
    source: ConsistencyModel,
    data: Dataset,
    teacher: ConsistencyModel | None = None,
    progress: Callable[[int, float], None] | None = None,
    **written: Any,
) -> ConsistencyModel:
    """Train a network of a recipe from the weights of `source`, and return its average; `written` is as for `train`."""
    _, method = METHODS[stage.method]
    learnt = frozen(teacher) if teacher is not None and method.needs_teacher else None
    made = method(method.student(source), stage.settings, stage.loop.iterations, learnt)
    if learnt is not None:
        written = {"description": {"teacher": fingerprint(learnt.parameters())}, **written}
    (average,) = train(made, data, stage.loop, progress=progress, **written).averages.values()
    return average


def measure(recipe: Recipe, folder: Path, train: Dataset, test: Dataset) -> list[Measured]:
    """Measure the stored models of a recipe: the student at 1, 2 and 4 steps beside the teacher's Heun sampler.

    A second classifier, with other random numbers, is trained for it: one by which nothing was chosen.
    """
    classifier = load_classifier(folder / f"{recipe.name}-classifier.safetensors")
    second = train_classifier(train, test, iterations=recipe.classifier_iterations, seed=SECOND_SEED)
    student, teacher = (frozen(load(folder / name)) for name in (recipe.name, f"{recipe.name}-teacher"))
    count = recipe.measured_samples
    labels = torch.arange(count) % (student.num_classes or 1)
    rows = []
    for label, model, sampler, steps in (
        *((f"student, {n} step{'s' if n > 1 else ''}", student, "multistep", n) for n in (1, 2, 4)),
        *((f"teacher, heun {n}", teacher, "heun", n) for n in recipe.teacher_steps),
        ("teacher, euler 1", teacher, "euler", 1),
    ):
        samples = model.sample(count, class_labels=labels, sampler=sampler, steps=steps, batch_size=250)
        evaluations = 2 * steps - 1 if sampler == "heun" else steps
        rows.append(measured(label, evaluations, samples, labels, (classifier, second), train))
    labels = test.labels
    return [*rows, measured("the real test set", 0, test.images, labels, (classifier, second), train)]


def measured(
    name: str,
    evaluations: int,
    samples: Tensor,
    labels: Tensor,
    classifiers: tuple[Classifier, Classifier],
    train: Dataset,
) -> Measured:
    """Measure samples by the classifier of the recipe and a second one."""
    quality, other = (evaluate(samples, labels, classifier) for classifier in classifiers)
    return Measured(name, evaluations, quality, other.accuracy, nearest_distance(samples, train.images))
