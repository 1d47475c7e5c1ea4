"""Power-function averages of weights, and averages of any length made of snapshots of these afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C.
A power-function average over a training until time t weighs the weights at time u ≤ t as u^γ.
"""

from collections.abc import Sequence

import numpy as np


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ of the profile whose standard deviation is the fraction sigma_rel of the training. Algorithm 2.

    Raises:
        ValueError: sigma_rel is not between 0 and 0.28, where the profile is flat (1/√12 = 0.2887 for γ = 0).
    """
    if not 0.0 < sigma_rel <= 0.28:
        raise ValueError(f"sigma_rel: expected a fraction of the training between 0 and 0.28, got {sigma_rel}")
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The relative standard deviation of the profile of exponent γ. Equation 126."""
    return ((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0))) ** 0.5


def solve(times: Sequence[float], gammas: Sequence[float], time: float, gamma: float) -> np.ndarray:
    """The factors [n] of n snapshots whose sum is the nearest to another average, in the least-squares sense.

    Algorithm 3: the profiles are functions on (0, t], and the distance is that of L². The factors sum to 1.

    Args:
        times: when each snapshot was taken [n]; in units of updates, or any other.
        gammas: the exponent of its average [n].
        time: of the average that is wanted, not before the first snapshot or after the last.
        gamma: its exponent.
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    products = _inner(t[:, None], g[:, None], t[None], g[None])
    wanted = _inner(t, g, np.float64(time), np.float64(gamma))
    factors = np.linalg.lstsq(products, wanted, rcond=None)[0]
    return factors / factors.sum()


def _inner(time_a: np.ndarray, gamma_a: np.ndarray, time_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The inner product of two profiles, (γ + 1) u^γ / t^(γ + 1) on (0, t]. Equation 151."""
    ratio = time_a / time_b
    power = np.where(time_a < time_b, gamma_b, -gamma_a)
    longest = np.maximum(time_a, time_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * longest)
