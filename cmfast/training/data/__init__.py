"""Data sets: samples in [-1, 1] with their classes, from folders of images, .npz, IDX, or scikit-learn's digits."""

from .dataset import Dataset, fingerprint, scaled
from .digits import load_digits
from .fashion import load_fashion
from .sources import load_data

__all__ = ["Dataset", "fingerprint", "load_data", "load_digits", "load_fashion", "scaled"]
