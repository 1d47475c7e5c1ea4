"""Consistency training, without a teacher. Song et al. 2023, "Consistency Models", algorithm 3."""

import dataclasses

import torch
from torch import Tensor, nn

from ...model import ConsistencyModel
from ...preconditioning import Consistency
from ..averages import average_into, averaged_copy
from .checks import preconditioning_of, require
from .conversion import consistency_from
from .discretisation import neighbours, square_root_steps, target_decay
from .levels import noised, uniform_index
from .losses import DistanceSettings, distance
from .method import Draws, Method


@dataclasses.dataclass(frozen=True)
class ConsistencyTrainingSettings(DistanceSettings):
    """Settings of `ConsistencyTraining`, beside those of the distance (`DistanceSettings`).

    The defaults are the paper's for CIFAR-10 (table 3), but for the loss.

    Attributes:
        first_steps: levels of the Karras grid at the start (the paper's s0).
        last_steps: levels of the grid at the end, less one (s1).
        first_target_decay: of the target network at the start (mu0).
        loss: see `DistanceSettings`; the paper's is "lpips".
    """

    first_steps: int = 2
    last_steps: int = 150
    first_target_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "first_steps", self.first_steps >= 2, "at least 2")
        require(self, "last_steps", self.last_steps >= self.first_steps, f"at least first_steps, {self.first_steps}")
        require(self, "first_target_decay", 0.0 < self.first_target_decay < 1.0, "between 0 and 1")


class ConsistencyTraining(Method):
    """Neighbours of a grid that grows, on the same line of noise, are mapped to the same sample.

    d(f(x0 + σ_{n+1} z, σ_{n+1}), f⁻(x0 + σ_n z, σ_n)) with f⁻ the target network, an average of the model with a decay
    that grows with the grid. Song et al. 2023, equation 10 with λ = 1; the schedules are those of its appendix C.
    """

    def __init__(
        self,
        model: ConsistencyModel,
        settings: ConsistencyTrainingSettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        self.preconditioning = preconditioning_of("ConsistencyTraining", model, Consistency)
        self.settings = settings
        self.target = averaged_copy(model)
        self.distance = distance(settings)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A consistency model with the weights of an EDM or consistency model."""
        return consistency_from(source)

    def steps(self, iteration: int) -> int:
        """Levels of the grid after so many updates."""
        return square_root_steps(iteration, self.iterations, self.settings.first_steps, self.settings.last_steps)

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The distance of each pair of neighbours [N]."""
        p, steps = self.preconditioning, self.steps(iteration)
        low, high = neighbours(p, uniform_index(draws, images, steps - 1), steps, images)
        noise = draws.normal(images)
        with torch.no_grad():
            wanted = self.target.denoise(noised(p, images, low, noise), low, labels)
        return self.distance(self.model.denoise(noised(p, images, high, noise), high, labels), wanted)

    def updated(self, iteration: int) -> None:
        """The target network follows, with the decay of the update that was made."""
        s = self.settings
        decay = target_decay(self.steps(iteration - 1), s.first_steps, s.first_target_decay)
        average_into(self.target, self.model, decay)

    def networks(self) -> dict[str, nn.Module]:
        """The target network."""
        return {"target": self.target}
