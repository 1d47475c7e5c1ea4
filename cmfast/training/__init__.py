"""Training: one loop for every method, from data to averaged weights."""

from .data import Dataset, load_data, load_digits
from .loop import DivergedError, Trained, train
from .settings import LoopSettings
from .snapshots import reconstruct

__all__ = ["Dataset", "DivergedError", "LoopSettings", "Trained", "load_data", "load_digits", "reconstruct", "train"]
