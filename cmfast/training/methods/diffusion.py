"""Training of diffusion models, the teachers. Karras et al. 2022, table 1; Lu and Song 2024; Liu et al. 2022."""

import dataclasses

import torch
from torch import Tensor

from ...model import ConsistencyModel
from ...preconditioning import EDM, Flow, TrigFlow
from .checks import preconditioning_of, require
from .conversion import copied
from .levels import karras_level, log_normal, noised, one_per_sample, per_sample
from .method import Draws, Method


@dataclasses.dataclass(frozen=True)
class DiffusionSettings:
    """Settings of `Diffusion`.

    Attributes:
        log_sigma_mean: mean of ln(sigma) in training; of ln(sigma / (1 - sigma)) for flow.
        log_sigma_std: its standard deviation.
        uniform_share: share of the levels that are spread evenly over the Karras grid, from sigma_min to sigma_max,
            instead (over (0, 1] for flow). The log-normal levels hardly reach sigma_max, where sampling starts: with
            the defaults 1 in 600,000 is above 80.
    """

    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    uniform_share: float = 0.0

    def __post_init__(self) -> None:
        require(self, "log_sigma_std", self.log_sigma_std > 0.0, "positive")
        require(self, "uniform_share", 0.0 <= self.uniform_share <= 1.0, "in [0, 1]")


class Diffusion(Method):
    """The denoising loss, weighted so that the network's output has the same weight at each level.

    weight(sigma) · ‖D(x, sigma) - x0‖² / d, with d elements a sample and x the sample of the forward process:

    | model    | weight                                     | equals                                           |
    |----------|--------------------------------------------|--------------------------------------------------|
    | EDM      | (sigma² + sigma_data²)/(sigma sigma_data)² | equation 8 of Karras et al. 2022 with its λ      |
    | TrigFlow | the same: 1 / (sigma_data · sin t)²        | ‖F - v / sigma_data‖²                            |
    | flow     | 1 / sigma²                                 | ‖F - (z - x0)‖²                                  |

    v is dx/dt = cos t · sigma_data · z - sin t · x0. These velocity losses are those of Lu and Song 2024, section 3,
    and of Liu et al. 2022, equation 1. Levels are log-normal (Karras et al. 2022, table 1); those of flow are
    logit-normal (Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 19), so that the ratio of noise to
    signal has the same distribution.
    """

    def __init__(
        self,
        model: ConsistencyModel,
        settings: DiffusionSettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        self.settings = settings
        self.preconditioning = preconditioning_of("Diffusion", model, EDM, TrigFlow, Flow)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A copy of an EDM, TrigFlow or flow model."""
        return copied(source, preconditioning_of("Diffusion", source, EDM, TrigFlow, Flow))

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The weighted squared error of each sample [N], averaged over its elements."""
        p = self.preconditioning
        sigma = self._levels(images, draws)
        x = noised(p, images, sigma, draws.normal(images))
        if isinstance(p, EDM):
            weight = (sigma**2 + p.sigma_data**2) / (sigma * p.sigma_data) ** 2
        else:
            weight = 1.0 / sigma**2
        error = (self.model.denoise(x, sigma, labels) - images) ** 2
        return (per_sample(weight, error) * error).flatten(1).mean(1)

    def _levels(self, images: Tensor, draws: Draws) -> Tensor:
        s, p = self.settings, self.preconditioning
        sigma = log_normal(draws, images, s.log_sigma_mean, s.log_sigma_std)
        if not isinstance(p, EDM):
            sigma = sigma / (1.0 + sigma)
        if s.uniform_share == 0.0:
            return sigma
        u = draws.uniform(one_per_sample(images)).double()
        position = 1.0 - (u / s.uniform_share).clamp(max=1.0)
        spread = karras_level(p, position, sigma) if isinstance(p, EDM) else position.to(sigma.dtype)
        return torch.where(u < s.uniform_share, spread, sigma)
