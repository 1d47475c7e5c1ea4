"""Steps of a teacher along the probability flow ODE, each sample from its own level to its own next one."""

from torch import Tensor

from ...model import ConsistencyModel
from .levels import per_sample


def euler_step(teacher: ConsistencyModel, x: Tensor, high: Tensor, low: Tensor, class_labels: Tensor | None) -> Tensor:
    """One step of Euler's method (DDIM) for each sample from its level high [N] to low [N].

    Karras et al. 2022, algorithm 1 without its lines 6 to 8.
    """
    h, t = per_sample(high, x), per_sample(low, x)
    return x + (t - h) / h * (x - teacher.denoise(x, high, class_labels))


def heun_step(teacher: ConsistencyModel, x: Tensor, high: Tensor, low: Tensor, class_labels: Tensor | None) -> Tensor:
    """One step of Heun's method for each sample from its level high [N] to low [N], not 0.

    Karras et al. 2022, algorithm 1.
    """
    h, t = per_sample(high, x), per_sample(low, x)
    slope = (x - teacher.denoise(x, high, class_labels)) / h
    predicted = x + (t - h) * slope
    slope_next = (predicted - teacher.denoise(predicted, low, class_labels)) / t
    return x + (t - h) * 0.5 * (slope + slope_next)
