"""The model card of a recipe: data, recipe, command, measured quality."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..evaluation.quality import Quality
from ..unet import UNet
from .data import Dataset
from .recipe import Recipe, Stage


class Measured(NamedTuple):
    """Quality of one way of sampling.

    Attributes:
        sampler: how it is called in the table.
        evaluations: of the network.
        quality: by the recipe's classifier.
        second_accuracy: by a second classifier, by which nothing was chosen.
        nearest: mean distance to the nearest training image.
    """

    sampler: str
    evaluations: int
    quality: Quality
    second_accuracy: float
    nearest: float


def model_card(
    recipe: Recipe,
    rows: Sequence[Measured],
    train: Dataset,
    test: Dataset,
    made: str,
) -> str:
    """The card as Markdown; `made` says when and where the weights were made."""
    name, parameters = recipe.name, sum(p.numel() for p in UNet(recipe.unet).parameters())
    levels = "; ".join(", ".join(f"{sigma:g}" for sigma in v) for v in recipe.recommended_levels.values())
    table = "\n".join(
        f"| {r.sampler} | {r.evaluations or ''} | {r.quality.accuracy:.3f} | {r.second_accuracy:.3f} "
        f"| {r.quality.frechet_test:.2f} | {r.quality.frechet_train:.2f} | {r.nearest:.2f} |"
        for r in rows
    )
    return f"""\
# Model card: {name}, {name}-teacher, {name}-classifier

Data: {recipe.title}; {len(train.labels)} for training and {len(test.labels)} for testing, scaled to [-1, 1].
Licence of the data: {recipe.licence}. Licence of the weights: MIT, as the code.

- `{name}-teacher`: EDM diffusion model, {parameters:,} parameters, {recipe.teacher.loop.iterations} iterations.
- `{name}`: consistency model of the same architecture, from the teacher by {recipe.student.method} in
  {recipe.student.loop.iterations} iterations.
- `{name}-classifier`: the classifier of the measures, with the feature statistics of both real sets.

Command: `cmfast train --recipe {name}{" --data FOLDER" if recipe.folder else ""} --out FOLDER`, with these settings:

```
unet     {_listed(dataclasses.asdict(recipe.unet))}
teacher  {_stage(recipe.teacher)}
student  {_stage(recipe.student)}
```

{made}

Measured on {recipe.measured_samples} samples of the stored float16 weights, seed 0: accuracy of the asked class, by the
classifier and by a second one (of another seed, by which nothing was chosen), Fréchet distance of the classifier's
features to the real test and training sets, mean distance to the nearest training image, which tells copies: they would
be nearer than real images of the test set are.

| sampler | evaluations | accuracy | by the second | to test | to train | nearest |
|---|---|---|---|---|---|---|
{table}

{_compared(recipe.student)}Levels (sigma) of the consistency model's evaluations: {levels}.
{recipe.notes and chr(10) + recipe.notes}"""


def _compared(student: Stage) -> str:
    if getattr(student.settings, "features", None) is None:
        return ""
    return (
        "The student's loss compares samples by the layers of a third classifier too, whose seed neither of these has. "
        "Distances\nof such features see more of what it gains than other measures do.\n\n"
    )


def _stage(stage: Stage) -> str:
    settings, loop = _listed(dataclasses.asdict(stage.settings)), _listed(stage.loop.of_the_weights())
    return f"{stage.method}: {settings}; {loop}"


def _listed(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
