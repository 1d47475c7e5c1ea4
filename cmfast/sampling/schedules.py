"""Grids of noise levels."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """N levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho), and a final 0.

    Karras et al. 2022, equation 5. For n = 1 the level is sigma_max.

    Raises:
        ValueError: n < 1, bounds that are not 0 < sigma_min < sigma_max, or a rho that is not positive and finite.
    """
    if n < 1:
        raise ValueError(f"karras_sigmas: n must be at least 1, got {n}")
    if not 0.0 < sigma_min < sigma_max < math.inf or not 0.0 < rho < math.inf:
        raise ValueError(
            f"karras_sigmas: expected finite 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}"
        )
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)] + [0.0]


def host_levels(sigmas: Sequence[float] | Tensor, *, final_zero: bool) -> list[float]:
    """The levels as decreasing host floats (one transfer, before the loop, where they are a device tensor).

    Args:
        sigmas: the levels.
        final_zero: the last one may be 0 (a diffusion sampler's grid); otherwise all must be positive.

    Raises:
        ValueError: no levels, or levels that are not finite, do not decrease, or are not positive.
    """
    levels = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    if len(levels) < (2 if final_zero else 1):
        raise ValueError(f"sigmas: expected at least {2 if final_zero else 1} levels, got {levels}")
    if not all(math.isfinite(s) for s in levels):
        raise ValueError(f"sigmas must be finite, got {levels}")
    for before, after in itertools.pairwise(levels):
        if after >= before:
            raise ValueError(f"sigmas must decrease, got {after:g} after {before:g}")
    if levels[-1] < 0.0 or (levels[-1] == 0.0 and not final_zero):
        raise ValueError(f"sigmas must be {'non-negative' if final_zero else 'positive'}, got {levels[-1]:g}")
    return levels
