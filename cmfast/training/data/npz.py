"""NumPy's .npz files: an array of images and, for classes, one of labels."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset

#: The names that arrays have in such files, the likeliest first; `{split}` is "train" or "test".
IMAGES = ("{split}_images", "x_{split}", "images", "image", "x", "X", "data", "samples", "arr_0")
LABELS = ("{split}_labels", "y_{split}", "labels", "label", "y", "Y", "targets", "classes", "arr_1")


def load_npz(path: Path, split: str = "train") -> Dataset:
    """Read images, and labels where the file has some.

    Images are [M, H, W], [M, H, W, C] or [M, C, H, W] with C 1 or 3: uint8, or floating-point numbers that are all in
    [-1, 1] with some below 0, or all in [0, 1], which is then mapped to [-1, 1]. Labels are integers [M].

    Raises:
        ValueError: the file is damaged, or its arrays are none of these.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a .npy file, of one array")
        with file:
            arrays = {name: file[name] for name in _wanted(file, path, split)}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError(f"{' and '.join(arrays)} are not arrays of numpy")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is not a whole .npz file of numbers: {error}") from error
    (image_name, images), *more = arrays.items()
    pixels = torch.from_numpy(_pixels(_channels_first(images, f"{path}, {image_name}"), f"{path}, {image_name}"))
    if not more:
        return Dataset(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    ((label_name, labels),) = more
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}, {label_name}: expected {len(images)} integers, one for each image, got {list(labels.shape)} "
            f"{labels.dtype}"
        )
    if labels.min() < 0:
        raise ValueError(f"{path}, {label_name}: labels count from 0, got {labels.min()}")
    return Dataset(pixels, torch.from_numpy(labels.reshape(-1).astype(np.int64)))


def _wanted(file: Mapping[str, np.ndarray], path: Path, split: str) -> list[str]:
    """The names of the images and, where there are some, of the labels."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for n in names if (name := n.format(split=split)) in file), None)

    images, labels = first(IMAGES), first(LABELS)
    if images is None:
        known = ", ".join(name.format(split=split) for name in IMAGES)
        raise ValueError(f"{path} has no images: its arrays are {', '.join(file) or 'none'}; expected one of {known}")
    return [images] if labels is None else [images, labels]


def _channels_first(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name}: expected images [M, H, W], [M, H, W, C] or [M, C, H, W] with C 1 or 3, got {list(images.shape)}"
        )
    if not images.size:
        raise ValueError(f"{name}: there are no images in it, its shape is {list(images.shape)}")
    return np.ascontiguousarray(images)


def _pixels(images: np.ndarray, name: str) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ValueError(f"{name}: expected uint8 or floating-point pixels, got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.0 and high <= 1.0):  # NaN is neither
        raise ValueError(f"{name}: expected pixels in [-1, 1] or [0, 1], or uint8, got {low:g} to {high:g}")
    images = images.astype(np.float32)
    return images if low < 0.0 else images * np.float32(2) - np.float32(1)
