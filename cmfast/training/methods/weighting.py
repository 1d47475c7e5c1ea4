"""A weight of each time that is learned: what makes the losses of all times equally large."""

import torch
from torch import Tensor, nn


class AdaptiveWeighting(nn.Module):
    """w(t), a cosine series on [0, π/2] whose coefficients are learned: exp(w(t)) · loss - w(t) is minimised.

    At its optimum w(t) = -ln of the mean loss at t. Karras et al. 2024, "Analyzing and Improving the Training Dynamics
    of Diffusion Models", appendix B.2, and Lu and Song 2024, section 4.2; their networks of random Fourier features
    are a series of `terms` cosines here, which starts from w = 0.
    """

    def __init__(self, terms: int = 32) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(terms))

    def forward(self, t: Tensor) -> Tensor:
        """Evaluate w [N] at the times t [N] in [0, π/2], float32 or wider: Σ_k coefficients[k] · cos(2 k t)."""
        k = torch.arange(len(self.coefficients), dtype=t.dtype, device=t.device)
        terms = torch.cos(2.0 * k * t[:, None]) * self.coefficients.to(t.dtype)
        return terms.sum(1)  # no product of matrices, which autocast would round
