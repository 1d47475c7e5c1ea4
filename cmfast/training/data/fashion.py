"""Fashion-MNIST, the data of the bundled models `fashion` and `fashion-teacher`."""

from pathlib import Path

from .dataset import Dataset, scaled
from .sources import load_data

#: What the classes are, in the order of their labels.
CLASS_NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_fashion(folder: str | Path) -> tuple[Dataset, Dataset]:
    """Fashion-MNIST's 60,000 training and 10,000 test images [M, 1, 28, 28], as (training, test) sets.

    Xiao et al. 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms".

    Args:
        folder: with the four IDX files, packed by gzip or not.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or of other images.
    """

    def named(data: Dataset) -> Dataset:
        return Dataset(scaled(data.images), data.labels, CLASS_NAMES)

    train, test = (load_data(folder, split=split) for split in ("train", "test"))
    for data in (train, test):
        if data.images.shape[1:] != (1, 28, 28) or data.num_classes != len(CLASS_NAMES):
            raise ValueError(
                f"{folder}: expected Fashion-MNIST's images of 1 x 28 x 28 in 10 classes, got "
                f"{' x '.join(map(str, data.images.shape[1:]))} in {data.num_classes}"
            )
    return named(train), named(test)
