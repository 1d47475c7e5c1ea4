"""What a recipe says: data, networks, settings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..preconditioning import EDM
from ..sound import Mdct
from ..unet import UNetConfig
from .data import Dataset
from .settings import LoopSettings


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one network of a recipe is trained.

    Attributes:
        method: its name, one of `METHODS`.
        settings: the method's own.
        loop: the loop's, with one average: the network that is kept.
    """

    method: str
    settings: Any
    loop: LoopSettings


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A data set with the settings that make a teacher, a student and a classifier of it.

    Attributes:
        name: of the student; the teacher is `name`-teacher, the classifier `name`-classifier.safetensors.
        title: for the model card.
        data: returns the (training, test) sets; called with the folder that they are in, or without arguments where
            they come with a package.
        unet: of both networks.
        teacher: how it is trained.
        student: how it is trained, with that teacher.
        classifier_iterations: updates of the classifier.
        recommended_levels: levels of the student's evaluations for a number of steps.
        measured_samples: samples a measure takes.
        folder: what the folder has to hold, for who has not given one; None where there is none.
        licence: of the data.
        notes: what else the card says of the weights, as Markdown.
        preconditioning: of the teacher, whose levels the student has too.
        representation: of sound, how waveforms are made of samples.
        teacher_steps: of the teacher's Heun sampler, at which it is measured.
    """

    name: str
    title: str
    data: Callable[..., tuple[Dataset, Dataset]]
    unet: UNetConfig
    teacher: Stage
    student: Stage
    classifier_iterations: int
    recommended_levels: dict[int, tuple[float, ...]]
    measured_samples: int = 1000
    folder: str | None = None
    licence: str = ""
    notes: str = ""
    preconditioning: EDM = dataclasses.field(default_factory=EDM)
    representation: Mdct | None = None
    teacher_steps: tuple[int, ...] = (5, 8, 10, 18, 40)

    def load(self, folder: str | Path | None) -> tuple[Dataset, Dataset]:
        """The (training, test) sets.

        Raises:
            ValueError: a folder is needed and was not given, or the other way round.
            FileNotFoundError, ValueError: the folder does not hold them; see `load_data`.
        """
        if (folder is None) != (self.folder is None):
            if self.folder is None:
                raise ValueError(f"the recipe {self.name} brings its data: leave out the folder {folder}")
            raise ValueError(f"the recipe {self.name} needs --data FOLDER, with {self.folder}")
        return self.data() if folder is None else self.data(folder)
