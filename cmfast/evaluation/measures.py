"""All measures of a set of samples, each with its number of samples and its confidence interval."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..finite import check_finite
from .bootstrap import Interval, interval
from .classifier import feature_statistics, in_batches
from .features import Features
from .precision_recall import NEIGHBOURS, precision_recall
from .quality import frechet_distance, nearest_distances


@dataclasses.dataclass(frozen=True)
class Measure:
    """A line of a report.

    Attributes:
        name: what was measured.
        value: with its confidence interval.
        count: of how many samples; of real images for recall.
        real: the same measure of other real images, which a perfect model would have; None where it is not known.
    """

    name: str
    value: Interval
    count: int
    real: float | None = None


def report(
    samples: Tensor,
    labels: Tensor | None,
    features: Features,
    *,
    real: Tensor | None = None,
    train: Tensor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> list[Measure]:
    """Measure samples.

    - Class accuracy, where the features are a classifier's and there are labels.
    - The Fréchet distance of the features to the real images' (Heusel et al. 2017), and to those whose statistics a
      classifier has.
    - Precision and recall, where real images are given.
    - The distance of a sample's pixels to the nearest training image, beside that of the real images: samples that are
      nearer than real ones are copies.

    Args:
        samples: [N, C, *spatial] in [-1, 1].
        labels: the classes that were asked for [N]; None for an unconditional model.
        features: what is compared.
        real: other real images [M, C, *spatial] in [-1, 1], such as a test set: at least four, as of samples then.
        train: the images that the model was trained on [K, C, *spatial] in [-1, 1], at least one.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two samples, too few images, or images and labels that do not fit.
        FloatingPointError: samples that are not finite.
    """
    if len(samples) < 2 or (labels is not None and labels.shape != samples.shape[:1]):
        raise ValueError(
            f"report: expected at least two samples and as many labels, got {len(samples)} and "
            f"{None if labels is None else list(labels.shape)}"
        )
    count = len(samples)
    for name, images in (("real", real), ("train", train)):
        if images is not None and images.shape[1:] != samples.shape[1:]:
            raise ValueError(f"report: samples are {list(samples.shape[1:])}, and {name} {list(images.shape[1:])}")
    for images in (samples, real, train):
        if images is not None:
            check_finite(images)
    if real is not None and min(len(real), count) <= NEIGHBOURS:
        raise ValueError(
            f"report: precision and recall need at least {NEIGHBOURS + 1} real images and samples, got {len(real)} and "
            f"{count}"
        )
    if train is not None and not len(train):
        raise ValueError("report: expected at least one training image, got 0")

    def measured(statistic: Callable[[Tensor], float], of: int = count) -> Interval:
        return interval(statistic, of, resamples=resamples, seed=seed)

    def mean(values: Tensor) -> Interval:
        return measured(lambda indices: values[indices].double().mean().item(), len(values))

    found: list[Measure] = []
    seen = in_batches(features.of, samples)
    classifier = features.classifier
    if classifier is not None and labels is not None:
        with torch.inference_mode():
            right = classifier.out(seen).argmax(1) == labels.cpu()
        found.append(Measure("accuracy", mean(right), count))
    others = None if real is None else in_batches(features.of, real)
    references: list[tuple[str, Sequence[Tensor]]] = []
    if classifier is not None:
        references += [(f"Fréchet to {split}", classifier.statistics(split)) for split in ("test", "train")]
    if others is not None:
        references.append(("Fréchet to data", feature_statistics(others)))
    for name, statistics in references:

        def distance(indices: Tensor, statistics: Sequence[Tensor] = statistics) -> float:
            return frechet_distance(*feature_statistics(seen[indices]), statistics[0], statistics[1])

        floor = None
        if name == "Fréchet to train" and classifier is not None:  # of one real set to the other
            floor = frechet_distance(*classifier.statistics("test"), *classifier.statistics("train"))
        found.append(Measure(name, measured(distance), count, floor))
    if others is not None:
        precise, recalled = precision_recall(others, seen)
        found.append(Measure("precision", mean(precise), count))
        found.append(Measure("recall", mean(recalled), len(others)))
    if train is not None:
        nearest = nearest_distances(samples, train)
        floor = None if real is None else nearest_distances(real, train).mean().item()
        found.append(Measure("distance to the nearest training image", mean(nearest), count, floor))
    return found
