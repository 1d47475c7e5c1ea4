"""Distances of two batches of samples: one number a sample."""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

#: distance(x, y) of samples [N, C, *spatial] -> [N].
Distance = Callable[[Tensor, Tensor], Tensor]

#: The names that `distance` knows.
LOSSES = ("l2", "pseudo-huber", "lpips")


def distance(name: str, huber_c: float) -> Distance:
    """The distance of that name; huber_c is the pseudo-Huber loss's, which the others have no use for.

    Raises:
        ValueError: an unknown name, or a pseudo-Huber loss without a positive huber_c.
        ImportError: "lpips", and its package is not installed.
        OSError: "lpips", and its network's weights are not there and cannot be fetched.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
    if name == "pseudo-huber" and huber_c <= 0.0:  # at 0 it has no gradient where the samples are equal
        raise ValueError(f"huber_c must be positive, got {huber_c}")
    if name == "lpips":
        return Lpips()
    return l2 if name == "l2" else functools.partial(pseudo_huber, c=huber_c)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """The mean of the squared differences of each sample [N]: ‖x - y‖² / d with d elements a sample."""
    return (x - y).flatten(1).square().mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """√(‖x - y‖² + c² · d) - c · √d of each sample [N], with d elements a sample.

    Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models", section 3.3, whose c is c · √d here:
    0.00054 is theirs.
    """
    difference = (x - y).flatten(1)
    c = c * math.sqrt(difference.shape[1])
    return (difference.square().sum(1) + c**2).sqrt() - c


class Lpips:
    """Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1, VGG.

    Samples smaller than 256 pixels are resized to 224, as Song et al. 2023 (appendix C) do, and grey ones count as
    three equal channels. The network of the package `lpips` compares them; its weights are torchvision's.
    """

    def __init__(self) -> None:
        try:
            package: Any = importlib.import_module("lpips")
        except ImportError as error:
            raise ImportError('the loss "lpips" needs the package lpips: pip install "cmfast[lpips]"') from error
        try:
            network = package.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise OSError(
                "the loss \"lpips\" needs torchvision's VGG16 weights, which are not in torch.hub's cache "
                f"and could not be fetched: {error}"
            ) from error
        self.network = network.eval().requires_grad_(False)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance [N] of images [N, 1 or 3, H, W] in [-1, 1].

        Raises:
            ValueError: samples that are not images of 1 or 3 channels.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f'the loss "lpips" compares images [N, 1 or 3, H, W], got {list(x.shape)}')
        return self.network.to(x.device)(_as_vgg_takes_it(x), _as_vgg_takes_it(y)).flatten()


def _as_vgg_takes_it(x: Tensor) -> Tensor:
    if x.shape[3] < 256:
        x = F.interpolate(x, size=224, mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1)
