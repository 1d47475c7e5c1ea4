"""How many levels consistency training has after so many updates, and which neighbours it compares."""

import math

import torch
from torch import Tensor

from ...preconditioning import EDM
from .levels import karras_level


def square_root_steps(iteration: int, iterations: int, first: int, last: int) -> int:
    """Levels N(k) after k of K updates, from first to last + 1.

    N(k) = ⌈√(k/K · ((last + 1)² - first²) + first²) - 1⌉ + 1. Song et al. 2023, "Consistency Models", appendix C.
    """
    square = iteration / iterations * ((last + 1) ** 2 - first**2) + first**2
    return math.ceil(math.sqrt(square) - 1.0) + 1


def doubling_steps(iteration: int, iterations: int, first: int, last: int) -> int:
    """Levels N(k) after k of K updates, from first + 1 to last + 1; the intervals between them double.

    N(k) = min(first · 2^⌊k/K'⌋, last) + 1 with K' = ⌊K / (log2⌊last/first⌋ + 1)⌋. Song and Dhariwal 2023, "Improved
    Techniques for Training Consistency Models", section 3.4.
    """
    period = math.floor(iterations / (math.log2(last // first) + 1.0))
    return min(first * 2 ** (iteration // max(period, 1)), last) + 1


def target_decay(steps: int, first: int, first_decay: float) -> float:
    """Decay of the target network with so many levels: exp(first · ln(first_decay) / steps).

    Song et al. 2023, "Consistency Models", appendix C.
    """
    return math.exp(first * math.log(first_decay) / steps)


def neighbours(p: EDM, lower: Tensor, steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The levels number lower and lower + 1 of the Karras grid of `steps` levels, counted from sigma_min.

    Args:
        p: has sigma_min, sigma_max and rho.
        lower: whole numbers [N] in 0 … steps - 2, float64.
        steps: levels of the grid.
        like: gives the dtype of the results.
    """
    return karras_level(p, lower / (steps - 1), like), karras_level(p, (lower + 1.0) / (steps - 1), like)


def log_normal_index(p: EDM, uniform: Tensor, steps: int, mean: float, std: float) -> Tensor:
    """The lower neighbour's number [N], float64, where ln sigma is normal and rounded down to the grid.

    p(i) ∝ erf((ln σ_{i+1} - mean) / (√2 std)) - erf((ln σ_i - mean) / (√2 std)), by inversion. Song and Dhariwal 2023,
    "Improved Techniques for Training Consistency Models", section 3.5.

    Args:
        p: has sigma_min, sigma_max and rho.
        uniform: numbers [N] in [0, 1).
        steps: levels of the Karras grid, numbered from sigma_min.
        mean: of ln sigma.
        std: of ln sigma.
    """
    u = uniform.double()
    positions = torch.arange(steps, dtype=torch.float64, device=u.device) / (steps - 1)
    cumulative = torch.erf((karras_level(p, positions, u).log() - mean) / (math.sqrt(2.0) * std))
    below = (cumulative[1:] - cumulative[0]) / (cumulative[-1] - cumulative[0])
    return torch.searchsorted(below, u, right=True).clamp(max=steps - 2).double()
