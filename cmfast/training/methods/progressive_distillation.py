"""Progressive distillation. Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models"."""

import dataclasses

import torch
from torch import Tensor, nn

from ...model import ConsistencyModel
from ...preconditioning import EDM
from ..averages import averaged_copy
from .checks import preconditioning_of, require, same_sigma_data
from .conversion import copied
from .levels import karras_level, noised, per_sample, uniform_index
from .losses import DistanceSettings, distance
from .method import Draws, Method
from .solvers import euler_step


@dataclasses.dataclass(frozen=True)
class ProgressiveDistillationSettings(DistanceSettings):
    """Settings of `ProgressiveDistillation`, beside those of the distance (`DistanceSettings`).

    Attributes:
        first_steps: sampling steps of the student in the first stage; the teacher takes twice as many.
        last_steps: sampling steps of the student in the last stage; first_steps is this times a power of 2.
        loss: see `DistanceSettings`; "l2" is the paper's.
    """

    first_steps: int = 16
    last_steps: int = 1
    _: dataclasses.KW_ONLY
    loss: str = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "last_steps", self.last_steps >= 1, "at least 1")
        powers = (self.last_steps << stage for stage in range(self.first_steps.bit_length()))
        expected = f"last_steps ({self.last_steps}) times a power of 2"
        require(self, "first_steps", self.first_steps in powers, expected)

    @property
    def stages(self) -> int:
        """How often a student is made: once, and once more for each halving."""
        return (self.first_steps // self.last_steps).bit_length()


class ProgressiveDistillation(Method):
    """One DDIM step of the student is taught two of the teacher, which is the student of the stage before.

    From x at the level σ, two Euler steps of the teacher to σ' and σ'' end in x''. The student must take one there:

        max(1/σ², 1) · d(D(x, σ), x̃)          x̃ = (x'' - σ''/σ · x) / (1 - σ''/σ)

    With N steps, the levels σ are the first N of the Karras grid of N + 1, σ'' is the next one of it, and σ' is halfway
    between them on the grid of 2N + 1. Salimans and Ho 2022, algorithm 2, with the truncated SNR as the weight, on
    EDM's levels as in Song et al. 2023, appendix C. The stages are equally long, and the student samples by
    `model.sample(sampler="progdist", steps=last_steps)`.
    """

    needs_teacher = True

    def __init__(
        self,
        model: ConsistencyModel,
        settings: ProgressiveDistillationSettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        assert teacher is not None
        given = preconditioning_of("ProgressiveDistillation: teacher", teacher, EDM)
        self.preconditioning = preconditioning_of("ProgressiveDistillation: student", model, EDM)
        same_sigma_data("ProgressiveDistillation", given, self.preconditioning)
        if iterations < settings.stages:
            raise ValueError(
                f"ProgressiveDistillation: {settings.stages} stages need as many iterations at least, got {iterations}"
            )
        self.settings = settings
        self.teacher = averaged_copy(teacher)
        self.distance = distance(settings)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A copy of the teacher."""
        return copied(source, preconditioning_of("ProgressiveDistillation", source, EDM))

    def stage(self, iteration: int) -> int:
        """The stage, counted from 0, of the update after so many."""
        return iteration * self.settings.stages // self.iterations

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The weighted distance [N] of the student's estimate to what two steps of the teacher amount to."""
        p, steps = self.preconditioning, self.settings.first_steps >> self.stage(iteration)
        index = uniform_index(draws, images, steps)
        high, middle, low = (karras_level(p, 1.0 - (index + part) / steps, images) for part in (0.0, 0.5, 1.0))
        x = noised(p, images, high, draws.normal(images))
        with torch.no_grad():
            halfway = euler_step(self.teacher, x, high, middle, labels)
            reached = euler_step(self.teacher, halfway, middle, low, labels)
            ratio = per_sample(low / high, x)
            wanted = (reached - ratio * x) / (1.0 - ratio)
        return (1.0 / high**2).clamp(min=1.0) * self.distance(self.model.denoise(x, high, labels), wanted)

    def updated(self, iteration: int) -> None:
        """At the end of a stage the student becomes the teacher of the next."""
        if self.stage(iteration) > self.stage(iteration - 1) and iteration < self.iterations:
            self.teacher.load_state_dict(self.model.state_dict())

    def networks(self) -> dict[str, nn.Module]:
        """The teacher of this stage."""
        return {"teacher": self.teacher}
