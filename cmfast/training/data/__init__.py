"""Data sets: samples in [-1, 1] with their classes, from folders of images, .npz, IDX, or a bundled model's data."""

from .dataset import Dataset, fingerprint, scaled
from .digits import load_digits
from .drums import load_drums
from .fashion import load_fashion
from .moving_digits import load_moving_digits
from .sources import has_splits, load_data

__all__ = [
    "Dataset",
    "fingerprint",
    "has_splits",
    "load_data",
    "load_digits",
    "load_drums",
    "load_fashion",
    "load_moving_digits",
    "scaled",
]
