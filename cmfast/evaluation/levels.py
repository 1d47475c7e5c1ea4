"""The best levels of a consistency model's evaluations, found one after another.

Song et al. 2023, "Consistency Models", section 3: the levels of algorithm 1 are found greedily, each by a ternary
search of the Fréchet distance, which takes the distance for unimodal in the level.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Swept(NamedTuple):
    """The best levels found for a number of steps, and their score."""

    levels: tuple[float, ...]
    score: float


def sweep(
    score: Callable[[Sequence[float]], float],
    steps: int,
    *,
    sigma_max: float,
    sigma_min: float,
    iterations: int = 8,
    progress: Callable[[Sequence[float], float], None] | None = None,
) -> Iterator[Swept]:
    """Yield the best levels for 1, 2, … steps.

    The first level is sigma_max. Each further one lies between the last and sigma_min: a third of the interval, in
    ln sigma, is left out in each iteration, so that 8 find the level to 4 % of the interval.

    Args:
        score: of levels, smaller is better, such as the Fréchet distance of samples of one seed.
        steps: the largest number.
        sigma_max: the first level.
        sigma_min: what all levels are above.
        iterations: of a search; each scores two levels.
        progress: called with each levels that were scored, and the score.

    Raises:
        ValueError: fewer than one step or iteration, or levels that do not decrease.
    """
    if steps < 1 or iterations < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sweep: expected steps, iterations >= 1 and 0 < sigma_min < sigma_max, got {steps}, {iterations}, "
            f"{sigma_min} and {sigma_max}"
        )

    def scored(levels: Sequence[float]) -> float:
        found = score(levels)
        if progress is not None:
            progress(levels, found)
        return found

    best = Swept((sigma_max,), scored((sigma_max,)))
    yield best
    for _ in range(steps - 1):
        before, low, high = best.levels, math.log(sigma_min), math.log(best.levels[-1])
        tried: list[Swept] = []
        for _ in range(iterations):
            pair = [low + (high - low) * third / 3 for third in (1, 2)]
            for level in pair:
                levels = (*before, math.exp(level))
                tried.append(Swept(levels, scored(levels)))
            lower, upper = tried[-2:]
            low, high = (low, pair[1]) if lower.score <= upper.score else (pair[0], high)
        best = min(tried, key=lambda one: one.score)
        yield best
