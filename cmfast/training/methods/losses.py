"""Distances of two batches of samples: one number a sample."""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...evaluation.classifier import load_classifier
from ..data.dataset import fingerprint
from .checks import require

#: distance(x, y) of samples [N, C, *spatial] -> [N].
Distance = Callable[[Tensor, Tensor], Tensor]

#: The names of a `loss`.
LOSSES = ("l2", "pseudo-huber", "lpips")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistanceSettings:
    """How a method compares two samples: by their elements, or what a network sees in them, or both.

    Attributes:
        loss: "l2", "pseudo-huber" or "lpips".
        huber_c: c of the pseudo-Huber loss, in units of √(elements of a sample).
        features: a classifier, by whose layers they are compared as well: a bundled model's name, or the path of a file
            (see `load_classifier`).
        feature_weight: of that distance; the loss has weight 1.
    """

    loss: str = "pseudo-huber"
    huber_c: float = 0.03
    features: str | None = None
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, "feature_weight", self.feature_weight > 0.0, "positive")


def distance(settings: DistanceSettings) -> Distance:
    """The distance of these settings.

    Raises:
        ValueError: an unknown name, or a pseudo-Huber loss without a positive huber_c.
        ImportError: "lpips", and its package is not installed.
        OSError: "lpips", and its network's weights are not there and cannot be fetched; or no classifier at `features`.
        CheckpointError: `features` is not a classifier's file.
    """
    loss = _loss(settings.loss, settings.huber_c)
    if settings.features is None:
        return loss
    features, weight = FeatureDistance(settings.features), settings.feature_weight
    return lambda x, y: loss(x, y) + weight * features(x, y)


def compared_by(settings: object) -> dict[str, Any]:
    """What else tells a training's settings apart: the classifier at `features`, by its weights and not by its path."""
    source = getattr(settings, "features", None)
    return {} if source is None else {"features": fingerprint(load_classifier(source).state_dict().values())}


def _loss(name: str, huber_c: float) -> Distance:
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


class FeatureDistance:
    """The distance of `Lpips` by a classifier of cmfast, which knows the data: Σ_l mean_p ‖φ_l(x)_p - φ_l(y)_p‖².

    φ_l(x)_p are the activations of layer l at position p, over their norm. Zhang et al. 2018, equation 1, with all
    w_l = 1. In float32, also under autocast. Do not take the classifier that measures the samples: the training would
    fit it.
    """

    def __init__(self, source: str) -> None:
        self.network = load_classifier(source).requires_grad_(False)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance [N] of samples [N, C, *spatial] in [-1, 1].

        Raises:
            ValueError: samples of other sizes than the classifier was trained on.
        """
        with torch.autocast(x.device.type, enabled=False):
            layers = [self.network.to(x.device).layers(images.float()) for images in (x, y)]
            pairs = [(_of_norm_one(a), _of_norm_one(b)) for a, b in zip(*layers, strict=True)]
            return sum((a - b).square().sum(1, keepdim=True).flatten(1).mean(1) for a, b in pairs)  # type: ignore


def _of_norm_one(h: Tensor) -> Tensor:
    """Activations [N, C, ...] over their norm across the channels."""
    return h * torch.rsqrt(h.square().sum(1, keepdim=True) + 1e-8)


class Lpips:
    """Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1, VGG.

    Samples smaller than 256 pixels are resized to 224, as Song et al. 2023 (appendix C) do, and grey ones count as
    three equal channels. The network of the package `lpips` compares them, in float32 also under autocast; its weights
    are torchvision's.
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
        with torch.autocast(x.device.type, enabled=False):
            return self.network.to(x.device)(*(_as_vgg_takes_it(images.float()) for images in (x, y))).flatten()


def _as_vgg_takes_it(x: Tensor) -> Tensor:
    if x.shape[3] < 256:
        x = F.interpolate(x, size=224, mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1)
