"""Averaged weights: exponential moving averages at fixed rates, and the power functions of post-hoc averages."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..model import ConsistencyModel
from .power import gamma_of

Network = TypeVar("Network", bound=nn.Module)


def averaged_copy(model: Network) -> Network:
    """A copy of the model to hold averaged weights, without gradients, in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Average ← decay · average + (1 - decay) · model, for every parameter; buffers become the model's."""
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [m.detach() for _, m in pairs], 1.0 - decay)
    for mine, its in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


def exponential(decay: float, warmup: bool = True) -> Callable[[int], float]:
    """The decay of the update u, from 1: a constant; with warm-up at most u / (u + 10), which forgets the start."""
    return lambda update: min(decay, update / (update + 10)) if warmup else decay


def power(sigma_rel: float) -> Callable[[int], float]:
    """The decay (1 - 1/u)^(γ + 1) of the update u, from 1: the average after t updates weighs update u as u^γ.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", equation 127.

    Args:
        sigma_rel: the profile's standard deviation as a fraction of the training until then; see `power.gamma_of`.
    """
    exponent = gamma_of(sigma_rel) + 1.0
    return lambda update: (1.0 - 1.0 / update) ** exponent


class Averages:
    """The averages of one training, side by side.

    Attributes:
        models: by name, "ema-0.999" for the decay .999 and "power-0.05" for the sigma_rel .05.
    """

    def __init__(
        self, model: ConsistencyModel, ema_decays: Sequence[float], ema_warmup: bool, power_sigma_rels: Sequence[float]
    ) -> None:
        self._decays = {f"ema-{decay:g}": exponential(decay, ema_warmup) for decay in ema_decays}
        self._decays |= {f"power-{sigma_rel:g}": power(sigma_rel) for sigma_rel in power_sigma_rels}
        self.models = {name: averaged_copy(model) for name in self._decays}

    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the model's weights, after so many updates."""
        for name, average in self.models.items():
            average_into(average, model, self._decays[name](updates))
