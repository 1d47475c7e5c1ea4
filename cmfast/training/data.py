"""Data sets: images in [-1, 1] with their labels."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Dataset(NamedTuple):
    """Images [M, C, H, W] in [-1, 1], float32, and labels [M], int64."""

    images: Tensor
    labels: Tensor


def load_digits(test_fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, as (training, test) sets split by a fixed seed.

    Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as fetch
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "cmfast[train]"') from error
    images, labels = fetch(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)[order] / 8.0 - 1.0  # 0 … 16 to [-1, 1]
    classes = torch.from_numpy(labels).long()[order]
    test = round(test_fraction * len(classes))
    return Dataset(pixels[test:], classes[test:]), Dataset(pixels[:test], classes[:test])


def batches(data: Dataset, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random batches of the data for ever: each pass goes through it in a new order.

    Raises:
        ValueError: a batch is to have more than there is, or nothing.
    """
    if not 1 <= batch_size <= len(data.labels):
        raise ValueError(f"batches: expected batch_size in 1 … {len(data.labels)}, the data's length, got {batch_size}")
    while True:
        order = torch.randperm(len(data.labels), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield data.images[chosen], data.labels[chosen]
