"""Continuous-time consistency training, sCT. Lu and Song 2024, algorithm 1 without a teacher."""

import torch
from torch import Tensor

from .continuous_consistency import ContinuousConsistency
from .levels import per_sample


class ContinuousConsistencyTraining(ContinuousConsistency):
    """The trajectory is the line of noise that the sample was made of: dx/dt = cos t · sigma_data · z - sin t · x0."""

    def velocity(self, x: Tensor, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Of that line; an unbiased estimate of the velocity of the probability flow."""
        sigma_data = self.preconditioning.sigma_data
        t = per_sample(torch.atan(sigma / sigma_data), x)
        return torch.cos(t) * sigma_data * noise - torch.sin(t) * images
