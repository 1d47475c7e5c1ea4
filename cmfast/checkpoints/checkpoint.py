"""What a file holds of a model, whatever its format: sizes, weights, preconditioning."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..preconditioning import EDM, Preconditioning
from ..sound import Mdct
from ..unet import UNet, UNetConfig


class CheckpointError(ValueError):
    """A file is not a checkpoint that cmfast can read; the message says what it holds and what was expected."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as the formats' readers give it and their writers take it.

    Attributes:
        config: sizes of the network.
        weights: its state_dict under `UNet`'s names, which are OpenAI's; dtypes as they are stored.
        preconditioning: what makes a denoiser of the network.
        recommended_levels: for a number of steps, the levels that were found best for this model.
        source: what errors name.
        representation: of a model of sound, how waveforms are made of its samples.

    Raises:
        CheckpointError: the names or shapes of the weights are not those of such a network, or their dtypes no
            network's.
    """

    config: UNetConfig
    weights: Mapping[str, Tensor]
    preconditioning: Preconditioning
    recommended_levels: Mapping[int, tuple[float, ...]]
    source: str
    representation: Mdct | None = None

    def __post_init__(self) -> None:
        check_weights(expected_weights(self.config), self.weights, self.source)
        for name, value in self.weights.items():
            if not value.is_floating_point():
                raise CheckpointError(f"{self.source}: {name} is {value.dtype}, expected floating-point numbers")

    def network(self) -> UNet:
        """The network on these weights, which it shares."""
        unet = _without_weights(self.config)
        unet.load_state_dict(dict(self.weights), assign=True)
        return unet

    def to(self, dtype: torch.dtype) -> "Checkpoint":
        """The same with floating-point weights of another dtype.

        Raises:
            ValueError: another dtype than float64, float32, float16 and bfloat16, or a weight is too large for it.
        """
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"weights are float64, float32, float16 or bfloat16, got {dtype}")
        weights = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.weights.items()
        }
        for name, value in weights.items():
            if bool((torch.isinf(value) & ~torch.isinf(self.weights[name])).any()):
                raise ValueError(
                    f"{self.source}: {name} has values beyond {torch.finfo(dtype).max:g}, the largest {dtype} number"
                )
        return dataclasses.replace(self, weights=weights)


@functools.lru_cache(maxsize=4)
def expected_weights(config: UNetConfig) -> Mapping[str, Tensor]:
    """The state_dict of such a network without its values: names and shapes, on the meta device."""
    return _without_weights(config).state_dict()


def check_weights(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError where names or shapes of the given tensors are not the expected ones."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    shapes = [name for name in expected if name in given and expected[name].shape != given[name].shape]
    problems = [
        f"{len(names)} names {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for names, what in ((missing, "are missing"), (extra, "are not this network's"), (shapes, "have other shapes"))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} holds the weights of another network: {'; '.join(problems)}")


def recommended_levels(
    content: Any, own: Preconditioning | None, given: Preconditioning | None
) -> dict[int, tuple[float, ...]]:
    """The levels that a file recommends for numbers of steps: of another preconditioning than its own, none.

    Args:
        content: numbers of steps to lists of levels, as JSON has them.
        own: the file's preconditioning.
        given: what takes its place, if anything.

    Raises:
        ValueError, TypeError, AttributeError: they are something else.
    """
    levels = {int(steps): tuple(values) for steps, values in content.items()}
    for steps, values in levels.items():
        if len(values) != steps or not all(isinstance(v, int | float) and 0 <= v < math.inf for v in values):
            raise ValueError(f"recommended levels for {steps} steps: expected as many, of 0 or more, got {values}")
    return levels if given is None or without_flags(own) == without_flags(given) else {}


def without_flags(scheme: Preconditioning | None) -> Preconditioning | None:
    """A preconditioning without what neither its levels nor its denoiser depend on, OpenAI's scripts' flags."""
    if not isinstance(scheme, EDM):
        return scheme
    return dataclasses.replace(scheme, num_train_timesteps=40, clip_denoised=True)


def channel_multiples(channels: Sequence[int], base: int) -> tuple[float, ...]:
    """UNetConfig's channel_mult: what the levels' channels are in units of `base`, whole numbers where they are."""
    multiples = (c // base if c % base == 0 else c / base for c in channels)
    return tuple(
        m if int(m * base) == c else math.nextafter(m, math.inf) for m, c in zip(multiples, channels, strict=True)
    )


def _without_weights(config: UNetConfig) -> UNet:
    """A network that is not filled with random numbers first, which would take longer than all else."""
    with torch.device("meta"):
        return UNet(config)
