"""Consistency distillation from an EDM teacher. Song et al. 2023, "Consistency Models", algorithm 2."""

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..model import ConsistencyModel
from ..preconditioning import EDM, Consistency
from .data import Dataset, batches
from .loop import average_into, averaged_copy, optimize
from .methods.solvers import heun_step


@dataclasses.dataclass(frozen=True)
class DistillationTraining:
    """Settings of `distill`.

    Attributes:
        iterations: updates.
        batch_size: images an update.
        learning_rate: of Adam.
        linear_tail: fraction of training at the end over which the learning rate falls to 0.
        grid_steps: levels of the Karras grid whose neighbours are matched.
        target_ema_decay: of the target network.
        ema_decay: of the weights that are returned; some of the teacher, where they start, stays in them.
        huber_c: c of the pseudo-Huber loss, in units of √(elements of a sample).
        gradient_clip: bound of the gradient's norm.
        seed: of batches, levels and noise.
    """

    iterations: int = 600
    batch_size: int = 128
    learning_rate: float = 5e-4
    linear_tail: float = 0.5
    grid_steps: int = 18
    target_ema_decay: float = 0.9
    ema_decay: float = 0.997
    huber_c: float = 0.03
    gradient_clip: float = 10.0
    seed: int = 0


def distill(
    teacher: ConsistencyModel,
    data: Dataset,
    settings: DistillationTraining,
    progress: Callable[[int, float], None] | None = None,
) -> ConsistencyModel:
    """Distil the teacher into a consistency model of the same architecture, and return it.

    The student starts from the teacher's weights. A step of the teacher with Heun's solver along the grid gives the
    pair of neighbours that the student, and its averaged copy at the lower level, must map to the same sample.

    Raises:
        ValueError: the teacher's preconditioning is not EDM.
    """
    p = teacher.preconditioning
    if type(p) is not EDM:
        raise ValueError(f"distill: expected a teacher with an EDM preconditioning, got {type(p).__name__}")
    s = settings
    generator = torch.Generator().manual_seed(s.seed)
    source = batches(data, s.batch_size, generator)
    levels = torch.tensor(p.grid(s.grid_steps)[:-1]).flip(0)  # from sigma_min up
    student = ConsistencyModel(averaged_copy(teacher.unet), Consistency(**dataclasses.asdict(p)))
    student.requires_grad_(True)
    target = cast(ConsistencyModel, averaged_copy(student))
    average = cast(ConsistencyModel, averaged_copy(student))

    def loss() -> Tensor:
        images, labels = next(source)
        classes = labels if teacher.num_classes else None
        lower = torch.randint(len(levels) - 1, labels.shape, generator=generator)
        low, high = levels[lower], levels[lower + 1]
        noise = torch.randn(images.shape, generator=generator)
        per_sample = (-1, *(1,) * (images.ndim - 1))
        x = images + high.reshape(per_sample) * noise
        with torch.no_grad():
            previous = heun_step(teacher, x, high, low, classes)
            wanted = target.denoise(previous, low, classes)
        difference = (student.denoise(x, high, classes) - wanted).flatten(1)
        c = s.huber_c * math.sqrt(difference.shape[1])
        return (torch.sqrt(difference.square().sum(1) + c**2) - c).mean()

    def after_step() -> None:
        average_into(target, student, s.target_ema_decay)
        average_into(average, student, s.ema_decay)

    student.train()
    optimize(
        student,
        loss,
        iterations=s.iterations,
        optimizer=torch.optim.Adam(student.parameters(), lr=s.learning_rate),
        schedule=lambda fraction: min(1.0, (1.0 - fraction) / s.linear_tail),
        clip=s.gradient_clip,
        after_step=after_step,
        progress=progress,
    )
    return average
