"""What a recipe says: data, networks, settings."""

import dataclasses
from collections.abc import Callable

from ..unet import UNetConfig
from .data import Dataset
from .diffusion import DiffusionTraining
from .distillation import DistillationTraining


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A data set with the settings that make a teacher, a student and a classifier of it.

    Attributes:
        name: of the student; the teacher is `name`-teacher, the classifier `name`-classifier.safetensors.
        title: for the model card.
        data: returns the (training, test) sets.
        unet: of both networks.
        teacher: settings.
        student: settings.
        classifier_iterations: updates of the classifier.
        recommended_levels: levels of the student's evaluations for a number of steps.
        measured_samples: samples a measure takes.
    """

    name: str
    title: str
    data: Callable[[], tuple[Dataset, Dataset]]
    unet: UNetConfig
    teacher: DiffusionTraining
    student: DistillationTraining
    classifier_iterations: int
    recommended_levels: dict[int, tuple[float, ...]]
    measured_samples: int = 1000
