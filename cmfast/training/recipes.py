"""Recipes: everything from data to the bundled models, with fixed seeds and iteration counts."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..evaluation.classifier import load_classifier, save_classifier
from ..evaluation.quality import evaluate, nearest_distance
from ..files import check_writable, whole_file
from ..model import ConsistencyModel, load
from ..storage import save
from ..unet import UNet, UNetConfig
from .card import Measured, model_card
from .classifier import train_classifier
from .data import Dataset, load_digits
from .drums_recipe import DRUMS
from .loop import train
from .methods import METHODS
from .methods.diffusion import DiffusionSettings
from .methods.distillation import DistillationSettings
from .moving_digits_recipe import MOVING_DIGITS
from .recipe import Recipe, Stage
from .settings import LoopSettings

#: Called with (stage, iterations done, iterations, loss).
Progress = Callable[[str, int, int, float], None]


RECIPES = {
    "digits": Recipe(
        name="digits",
        title="scikit-learn's handwritten digits, 8×8 pixels, grey, class-conditional",
        data=load_digits,
        unet=UNetConfig(
            image_size=8,
            in_channels=1,
            out_channels=1,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_head_channels=32,
            num_classes=10,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        teacher=Stage(
            "diffusion",
            DiffusionSettings(),
            LoopSettings(iterations=2000, learning_rate=1e-3, schedule="cosine", ema_decays=(0.999,)),
        ),
        student=Stage(
            "distillation",
            DistillationSettings(grid_steps=18, target_ema_decay=0.9, huber_c=0.03),
            LoopSettings(
                iterations=600,
                learning_rate=5e-4,
                schedule="linear-tail",
                gradient_clip=10.0,
                ema_decays=(0.997,),
                ema_warmup=False,  # some of the teacher, where they start, stays in them
            ),
        ),
        classifier_iterations=800,
        recommended_levels={1: (80.0,), 2: (80.0, 0.5), 4: (80.0, 2.0, 0.8, 0.3)},
    )
}
RECIPES |= {recipe.name: recipe for recipe in (DRUMS, MOVING_DIGITS)}


def run(recipe: Recipe, out: str | Path, progress: Progress | None = None) -> list[Measured]:
    """Train everything of a recipe, write it to the folder `out` with a model card, and return what was measured.

    Returns:
        Rows (sampler, evaluations, quality, mean distance to the nearest training image), as the card has them.

    Raises:
        OSError: the folder cannot be written to (found out before training).
    """
    out = Path(out)
    check_writable(out / "README.md")

    def stage(name: str, total: int) -> Callable[[int, float], None] | None:
        return None if progress is None else lambda i, loss: progress(name, i + 1, total, loss)

    data, test = recipe.data()
    iterations = recipe.classifier_iterations
    classifier = train_classifier(data, test, iterations=iterations, progress=stage("classifier", iterations))
    save_classifier(classifier, out / f"{recipe.name}-classifier.safetensors")

    torch.manual_seed(recipe.teacher.loop.seed)
    new = ConsistencyModel(UNet(recipe.unet), recipe.preconditioning, representation=recipe.representation)
    teacher = train_stage(recipe.teacher, new, data, None, stage("teacher", recipe.teacher.loop.iterations))
    save(teacher, out / f"{recipe.name}-teacher", dtype=torch.float16)

    teacher = load(out / f"{recipe.name}-teacher")  # as it is stored: what the student learns from can be looked at
    student = train_stage(recipe.student, teacher, data, teacher, stage("student", recipe.student.loop.iterations))
    student.recommended_levels = dict(recipe.recommended_levels)
    save(student, out / recipe.name, dtype=torch.float16)

    rows = measure(recipe, out, data)
    with whole_file(out / "README.md") as file:
        file.write_text(model_card(recipe, rows, data, test, classifier))
    return rows


def train_stage(
    stage: Stage,
    source: ConsistencyModel,
    data: Dataset,
    teacher: ConsistencyModel | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> ConsistencyModel:
    """Train a network of a recipe from the weights of `source`, and return its average."""
    _, method = METHODS[stage.method]
    made = method(method.student(source), stage.settings, stage.loop.iterations, teacher)
    (average,) = train(made, data, stage.loop, progress=progress).averages.values()
    return average


def measure(recipe: Recipe, folder: Path, train: Dataset) -> list[Measured]:
    """Measure the stored models of a recipe: the student at 1, 2 and 4 steps beside the teacher's Heun sampler."""
    classifier = load_classifier(folder / f"{recipe.name}-classifier.safetensors")
    student, teacher = load(folder / recipe.name), load(folder / f"{recipe.name}-teacher")
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
        rows.append(
            Measured(label, evaluations, evaluate(samples, labels, classifier), nearest_distance(samples, train.images))
        )
    return rows
