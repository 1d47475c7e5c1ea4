"""Improved consistency training. Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models"."""

import dataclasses

from torch import Tensor

from ...model import ConsistencyModel
from ...preconditioning import Consistency
from .checks import preconditioning_of, require
from .conversion import consistency_from
from .discretisation import doubling_steps, log_normal_index, neighbours
from .levels import noised, one_per_sample
from .losses import DistanceSettings, distance
from .method import Draws, Method
from .targets import same_dropout


@dataclasses.dataclass(frozen=True)
class ImprovedConsistencyTrainingSettings(DistanceSettings):
    """Settings of `ImprovedConsistencyTraining`, beside those of the distance (`DistanceSettings`).

    The defaults are the paper's (table 1).

    Attributes:
        first_steps: intervals of the Karras grid at the start (the paper's s0).
        last_steps: the most intervals (s1).
        log_sigma_mean: mean of ln(sigma) of the lower neighbour.
        log_sigma_std: its standard deviation.
    """

    first_steps: int = 10
    last_steps: int = 1280
    log_sigma_mean: float = -1.1
    log_sigma_std: float = 2.0
    _: dataclasses.KW_ONLY
    huber_c: float = 0.00054

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "first_steps", self.first_steps >= 1, "at least 1")
        require(self, "last_steps", self.last_steps >= self.first_steps, f"at least first_steps, {self.first_steps}")
        require(self, "log_sigma_std", self.log_sigma_std > 0.0, "positive")


class ImprovedConsistencyTraining(Method):
    """Consistency training with log-normal levels, a grid that doubles, a weight, and no average as a target.

    d(f(x0 + σ_{i+1} z, σ_{i+1}), stopgrad f(x0 + σ_i z, σ_i)) / (σ_{i+1} - σ_i), both with the same dropout, d the
    pseudo-Huber distance with c = 0.00054 √d. Song and Dhariwal 2023, section 3 and table 1.
    """

    def __init__(
        self,
        model: ConsistencyModel,
        settings: ImprovedConsistencyTrainingSettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        self.preconditioning = preconditioning_of("ImprovedConsistencyTraining", model, Consistency)
        self.settings = settings
        self.distance = distance(settings)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A consistency model with the weights of an EDM or consistency model."""
        return consistency_from(source)

    def steps(self, iteration: int) -> int:
        """Levels of the grid after so many updates."""
        return doubling_steps(iteration, self.iterations, self.settings.first_steps, self.settings.last_steps)

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The weighted distance of each pair of neighbours [N]."""
        s, p, steps = self.settings, self.preconditioning, self.steps(iteration)
        uniform = draws.uniform(one_per_sample(images))
        index = log_normal_index(p, uniform, steps, s.log_sigma_mean, s.log_sigma_std)
        low, high = neighbours(p, index, steps, images)
        noise = draws.normal(images)
        with same_dropout(images):
            wanted = self.model.denoise(noised(p, images, low, noise), low, labels)
        denoised = self.model.denoise(noised(p, images, high, noise), high, labels)
        return self.distance(denoised, wanted) / (high - low)
