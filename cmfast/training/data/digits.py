"""scikit-learn's handwritten digits, the data of the bundled models."""

import torch

from .dataset import Dataset


def load_digits(test_fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 handwritten digits of ten classes, as (training, test) sets: images [M, 1, 8, 8] in [-1, 1].

    Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.

    Args:
        test_fraction: of all digits, in the test set.
        seed: of the order in which they are divided.

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
