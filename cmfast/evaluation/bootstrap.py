"""Confidence intervals by the bootstrap. Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A measured value and its confidence interval."""

    value: float
    low: float
    high: float


def interval(
    statistic: Callable[[Tensor], float], count: int, *, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> Interval:
    """The statistic of all samples, with the interval in which it would lie for other samples of the same model.

    The samples are drawn anew from themselves, with replacement. A Fréchet distance of such a set is larger throughout,
    since it has fewer different samples: so the percentiles are taken about the mean of the resampled values, and moved
    to the value itself.

    Args:
        statistic: a number for the samples with some indices [count], int64.
        count: of samples.
        resamples: how often they are drawn anew.
        level: the probability of the interval.
        seed: of the drawing.

    Raises:
        ValueError: fewer than two samples or resamples, or a level that is no probability.
    """
    if count < 2 or resamples < 2 or not 0 < level < 1:
        raise ValueError(
            f"interval: expected two samples and resamples or more and a level in (0, 1), got {count}, {resamples} and "
            f"{level}"
        )
    generator = torch.Generator().manual_seed(seed)
    value = statistic(torch.arange(count))
    drawn = [statistic(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)]
    values = torch.tensor(drawn, dtype=torch.float64)
    outside = (1 - level) / 2
    low, high = torch.quantile(
        values - values.mean(), torch.tensor([outside, 1 - outside], dtype=torch.float64)
    ).tolist()
    return Interval(value, value + low, value + high)
