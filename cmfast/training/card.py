"""The model card of a recipe: data, recipe, command, measured quality."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..evaluation.classifier import Classifier
from ..evaluation.quality import Quality, evaluate, nearest_distance
from ..unet import UNet
from .data import Dataset
from .recipe import Recipe, Stage


class Measured(NamedTuple):
    """Quality of one way of sampling; `nearest` is the mean distance to the nearest training image."""

    sampler: str
    evaluations: int
    quality: Quality
    nearest: float


def model_card(
    recipe: Recipe,
    rows: Sequence[Measured],
    train: Dataset,
    test: Dataset,
    classifier: Classifier,
) -> str:
    """The card as Markdown."""
    with torch.inference_mode():
        real = evaluate(test.images, test.labels, classifier)
    name, parameters = recipe.name, sum(p.numel() for p in UNet(recipe.unet).parameters())
    levels = "; ".join(", ".join(f"{sigma:g}" for sigma in v) for v in recipe.recommended_levels.values())
    table = "\n".join(
        f"| {r.sampler} | {r.evaluations} | {r.quality.accuracy:.3f} | {r.quality.frechet_test:.2f} "
        f"| {r.quality.frechet_train:.2f} | {r.nearest:.2f} |"
        for r in rows
    )
    return f"""\
# Model card: {name}, {name}-teacher, {name}-classifier

Data: {recipe.title}; {len(train.labels)} images for training and {len(test.labels)} for testing,
split by a fixed seed, pixels scaled to [-1, 1]. Licence of the weights: MIT, as the code.

- `{name}-teacher`: EDM diffusion model, {parameters:,} parameters, {recipe.teacher.loop.iterations} iterations.
- `{name}`: consistency model of the same architecture, distilled from the teacher in
  {recipe.student.loop.iterations} iterations.
- `{name}-classifier`: the classifier of the measures, with the feature statistics of both real sets.

Command: `cmfast train --recipe {name} --out FOLDER`, with these settings:

```
unet     {_listed(dataclasses.asdict(recipe.unet))}
teacher  {_stage(recipe.teacher)}
student  {_stage(recipe.student)}
```

Measured on {recipe.measured_samples} samples of the stored float16 weights, seed 0: accuracy of the asked class,
Fréchet distance of the classifier's features to the real test and training sets, mean distance to the nearest training
image.
The real test set: accuracy {real.accuracy:.3f}, {real.frechet_train:.2f} to the training set, nearest \
{nearest_distance(test.images, train.images):.2f}.

| sampler | evaluations | accuracy | to test | to train | nearest |
|---|---|---|---|---|---|
{table}

Levels (sigma) of the consistency model's evaluations: {levels}.
"""


def _stage(stage: Stage) -> str:
    settings, loop = _listed(dataclasses.asdict(stage.settings)), _listed(stage.loop.of_the_weights())
    return f"{stage.method}: {settings}; {loop}"


def _listed(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
