"""Measures of samples: do they show the class that was asked for, and are they distributed as the data are?"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..finite import check_finite
from .classifier import Classifier, feature_statistics, in_batches


class Quality(NamedTuple):
    """Quality of a set of samples.

    Attributes:
        accuracy: fraction that the classifier assigns to the class that was asked for. No measure by itself: blurred
            class means score 1.
        frechet_test: Fréchet distance of the features to the real test set's; it saturates at what two real sets have.
        frechet_train: the same to the training set, which goes to 0 as samples repeat it.
    """

    accuracy: float
    frechet_test: float
    frechet_train: float


@torch.inference_mode()
def evaluate(samples: Tensor, labels: Tensor, classifier: Classifier) -> Quality:
    """Measure samples [N, C, *spatial] in [-1, 1] of the classes labels [N].

    Raises:
        ValueError: fewer than two samples, or another number of labels.
        FloatingPointError: samples that are not finite.
    """
    if len(samples) < 2 or labels.shape != samples.shape[:1]:
        raise ValueError(
            f"evaluate: expected at least two samples and as many labels, got {len(samples)} and {list(labels.shape)}"
        )
    check_finite(samples)
    features = in_batches(classifier.features, samples)
    predicted = classifier.out(features).argmax(1)
    statistics = feature_statistics(features)
    return Quality(
        accuracy=(predicted == labels.cpu()).float().mean().item(),
        frechet_test=frechet_distance(*statistics, *classifier.statistics("test")),
        frechet_train=frechet_distance(*statistics, *classifier.statistics("train")),
    )


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½).

    Heusel et al. 2017, equation 6. Means [D], covariances [D, D]; in float64. The last trace is the sum of the singular
    values of C1^½ C2^½: taken as roots of eigenvalues of the product, what is rounding of 0 would add up.
    """
    c1, c2 = covariance1.double(), covariance2.double()
    cross = torch.linalg.svdvals(_root(c1) @ _root(c2)).sum()
    gap = (mean1.double() - mean2.double()).square().sum()
    return (gap + c1.trace() + c2.trace() - 2.0 * cross).item()


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def nearest_distance(samples: Tensor, images: Tensor) -> float:
    """Mean Euclidean distance of the samples [N, …] to the nearest of the images [M, …]; small values mean copies."""
    return nearest_distances(samples, images).mean().item()


def nearest_distances(samples: Tensor, images: Tensor) -> Tensor:
    """Euclidean distance of each of the samples [N, …] to the nearest of the images [M, …]: [N], on the CPU.

    Raises:
        ValueError: no images.
    """
    if not len(images):
        raise ValueError("nearest_distances: expected at least one image, got 0")
    flat, found = images.flatten(1).float().cpu(), []
    for part in samples.flatten(1).float().cpu().split(1024):
        nearest = flat[torch.cdist(part, flat).argmin(1)]  # by products, which lose the distances of copies
        found.append((part - nearest).norm(dim=1))
    return torch.cat(found)
