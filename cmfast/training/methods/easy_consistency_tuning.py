"""Easy consistency tuning, from a diffusion model. Geng et al. 2024, "Consistency Models Made Easy"."""

import dataclasses
import math

import torch
from torch import Tensor

from ...model import ConsistencyModel
from ...preconditioning import Consistency
from .checks import preconditioning_of, require
from .conversion import consistency_from
from .levels import log_normal, noised, per_sample
from .losses import DistanceSettings, distance
from .method import Draws, Method
from .targets import same_dropout


@dataclasses.dataclass(frozen=True)
class EasyConsistencyTuningSettings(DistanceSettings):
    """Settings of `EasyConsistencyTuning`, beside those of the distance (`DistanceSettings`).

    The defaults are the paper's for CIFAR-10, but huber_c, which is 0 there.

    Attributes:
        log_sigma_mean: mean of ln(t).
        log_sigma_std: its standard deviation.
        stages: in each, of equal length, the distance of r from t is that of the one before divided by q.
        q: factor of the stages.
        k: n(t) = 1 + k · sigmoid(-b t): how much further r is from t at low levels.
        b: see k.
    """

    log_sigma_mean: float = -1.1
    log_sigma_std: float = 2.0
    stages: int = 8
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    _: dataclasses.KW_ONLY
    huber_c: float = 0.00054

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "log_sigma_std", self.log_sigma_std > 0.0, "positive")
        require(self, "stages", self.stages >= 1, "at least 1")
        require(self, "q", self.q > 1.0, "more than 1")
        require(self, "k", self.k >= 0.0, "at least 0")
        closest = "at most 2²³ to the power of 1 / stages, or float32 could not tell the last stage's levels apart"
        require(self, "q", self.stages * math.log2(self.q) <= 23.0, closest)


class EasyConsistencyTuning(Method):
    """The distance between two levels t and r shrinks from that of a diffusion model, r = 0, stage by stage.

    d(f(x0 + t z, t), stopgrad f(x0 + r z, r)) / (t - r), both with the same dropout, and

        r = max(0, t · (1 - n(t) / q^a))        a = 1 + the number of the stage        n(t) = 1 + k · sigmoid(-b t)

    Geng et al. 2024, sections 3 and 4: the mapping with its sigmoid, and the weight; the pseudo-Huber distance gives
    the adaptive weight 1 / √(‖Δ‖² + c²) to the squared error. Where r is below sigma_min, the boundary of f, the
    target is x0 itself; t is not below sigma_min.
    """

    def __init__(
        self,
        model: ConsistencyModel,
        settings: EasyConsistencyTuningSettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        self.preconditioning = preconditioning_of("EasyConsistencyTuning", model, Consistency)
        self.settings = settings
        self.distance = distance(settings)

    @classmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A consistency model with the weights of the diffusion model."""
        return consistency_from(source)

    def lower(self, t: Tensor, iteration: int) -> Tensor:
        """The level r [N] that is compared with the level t [N] after so many updates."""
        s = self.settings
        stage = iteration * s.stages // self.iterations
        n = 1.0 + s.k * torch.sigmoid(-s.b * t)
        return (t * (1.0 - n / s.q ** (stage + 1))).clamp(min=0.0)

    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The weighted distance of each pair of levels [N]."""
        s, p = self.settings, self.preconditioning
        t = log_normal(draws, images, s.log_sigma_mean, s.log_sigma_std).clamp(min=p.sigma_min)
        r = self.lower(t, iteration)
        noise = draws.normal(images)
        with same_dropout(images):
            above = r.clamp(min=p.sigma_min)
            wanted = self.model.denoise(noised(p, images, above, noise), above, labels)
            wanted = torch.where(per_sample(r < p.sigma_min, images), images, wanted)
        denoised = self.model.denoise(noised(p, images, t, noise), t, labels)
        return self.distance(denoised, wanted) / (t - r)
