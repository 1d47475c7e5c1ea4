"""Continuous-time consistency distillation, sCD. Lu and Song 2024, algorithm 1 with a diffusion model as teacher."""

import torch
from torch import Tensor

from ...model import ConsistencyModel
from ...preconditioning import EDM, TrigFlow
from .checks import preconditioning_of, same_sigma_data
from .continuous_consistency import ContinuousConsistency, ContinuousConsistencySettings
from .conversion import trigflow_of, viewed
from .levels import per_sample


class ContinuousConsistencyDistillation(ContinuousConsistency):
    """The trajectory is the teacher's probability flow: dx/dt = sigma_data · F_teacher(x / sigma_data, t).

    The teacher is a TrigFlow diffusion model, or an EDM one in TrigFlow's variables (see `trigflow_from`).
    """

    needs_teacher = True

    def __init__(
        self,
        model: ConsistencyModel,
        settings: ContinuousConsistencySettings,
        iterations: int,
        teacher: ConsistencyModel | None = None,
    ) -> None:
        super().__init__(model, settings, iterations, teacher)
        assert teacher is not None
        given = preconditioning_of("ContinuousConsistencyDistillation: teacher", teacher, EDM, TrigFlow)
        same_sigma_data("ContinuousConsistencyDistillation", given, self.preconditioning)
        self.teacher = viewed(teacher, trigflow_of(given))

    def velocity(self, x: Tensor, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Of the teacher's probability flow: (cos t · x - D(x, sigma)) / sin t."""
        t = per_sample(torch.atan(sigma / self.preconditioning.sigma_data), x)
        return (torch.cos(t) * x - self.teacher.denoise(x, sigma, labels)) / torch.sin(t)
