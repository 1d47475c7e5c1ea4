"""The learning rate over a training."""

import math

from .settings import LoopSettings


def learning_rate(settings: LoopSettings, iteration: int) -> float:
    """The learning rate of the update after `iteration` others: the highest one, times warm-up, times the schedule."""
    warmup = min(1.0, (iteration + 1) / settings.warmup) if settings.warmup else 1.0
    return settings.learning_rate * warmup * decay(settings, iteration)


def decay(settings: LoopSettings, iteration: int) -> float:
    """The schedule's factor, from 1 on.

    - constant: 1.
    - cosine: half a cosine, to 0. Loshchilov and Hutter 2017, equation 5, without restarts.
    - linear-tail: 1, and in the last part of training, `linear_tail` of it, linearly to 0.
    - inverse-square-root: 1 for `decay_start` updates, then 1/√ of the updates in units of these. Karras et al. 2024,
      "Analyzing and Improving the Training Dynamics of Diffusion Models", the schedule of EDM2.
    """
    fraction = iteration / settings.iterations
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * fraction))
    if settings.schedule == "linear-tail":
        return min(1.0, (1.0 - fraction) / settings.linear_tail)
    if settings.schedule == "inverse-square-root":
        return 1.0 / math.sqrt(max(1.0, iteration / settings.decay_start))
    return 1.0
