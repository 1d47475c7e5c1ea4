"""Consistency distillation from an EDM teacher. Song et al. 2023, "Consistency Models", algorithm 2."""

import dataclasses

import torch
from torch import Tensor, nn

from ...model import ConsistencyModel
from ...preconditioning import EDM, Consistency
from ..averages import average_into, averaged_copy
from .checks import preconditioning_of, require, same_sigma_data
from .conversion import consistency_from
from .discretisation import neighbours
from .levels import karras_level, noised, one_per_sample, uniform_index
from .losses import DistanceSettings, distance
from .method import Draws, Method
from .solvers import euler_step, heun_step

#: The solvers of the teacher's step.
SOLVERS = {"heun": heun_step, "euler": euler_step}

#: Where neighbours are taken.
LEVELS = ("grid", "continuous")


@dataclasses.dataclass(frozen=True)
class DistillationSettings(DistanceSettings):
    """Settings of `Distillation`, beside those of the distance (`DistanceSettings`).

    Attributes:
        grid_steps: levels of the Karras grid whose neighbours are matched.
        levels: "grid", the paper's: neighbours are two levels of the grid, and the student learns no others.
            "continuous": any two that are a step of the grid apart, so that it can be sampled from all levels.
        solver: of the teacher's step between them, "heun" or "euler".
        target_ema_decay: of the target network.
    """

    grid_steps: int = 18
    levels: str = "grid"
    solver: str = "heun"
    target_ema_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "grid_steps", self.grid_steps >= 2, "at least 2")
        require(self, "levels", self.levels in LEVELS, " or ".join(LEVELS))
        require(self, "solver", self.solver in SOLVERS, " or ".join(SOLVERS))
        require(self, "target_ema_decay", 0.0 <= self.target_ema_decay < 1.0, "in [0, 1)")


class Distillation(Method):
    """A step of the teacher along the grid gives two neighbours, which the student must map to the same sample.

    d(f(x, σ_{n+1}), f⁻(x', σ_n)), with x' the teacher's step from x and f⁻ the target network, an average of the
    student. Song et al. 2023, equation 7 with λ = 1.
    """

    needs_teacher = True

    def __init__(
        self,
        model: ConsistencyModel,
        settings: DistillationSettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        assert teacher is not None
        given = preconditioning_of("Distillation: teacher", teacher, EDM)
        self.preconditioning = preconditioning_of("Distillation: student", model, Consistency)
        same_sigma_data("Distillation", given, self.preconditioning)
        self.settings, self.teacher = settings, teacher
        self.target = averaged_copy(model)
        self.distance = distance(settings)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A consistency model with the teacher's weights."""
        return consistency_from(source)

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The distance of each pair of neighbours [N]."""
        s, p = self.settings, self.preconditioning
        low, high = self.neighbours(images, draws)
        x = noised(p, images, high, draws.normal(images))
        with torch.no_grad():
            previous = SOLVERS[s.solver](self.teacher, x, high, low, labels)
            wanted = self.target.denoise(previous, low, labels)
        return self.distance(self.model.denoise(x, high, labels), wanted)

    def neighbours(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The two levels of each sample, low and high [N].

        On continuous levels the higher one's position is uniform in [0, 1 + a step], where 1 is sigma_max: what exceeds
        it is there, so that the level at which sampling begins is as likely as on the grid.
        """
        steps, p = self.settings.grid_steps, self.preconditioning
        if self.settings.levels == "grid":
            return neighbours(p, uniform_index(draws, images, steps - 1), steps, images)
        step = 1.0 / (steps - 1)
        position = (draws.uniform(one_per_sample(images)).double() * (1.0 + step)).clamp(max=1.0)
        return karras_level(p, (position - step).clamp(min=0.0), images), karras_level(p, position, images)

    def updated(self, iteration: int) -> None:
        """The target network follows the student."""
        average_into(self.target, self.model, self.settings.target_ema_decay)

    def networks(self) -> dict[str, nn.Module]:
        """The target network."""
        return {"target": self.target}
