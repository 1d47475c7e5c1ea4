"""One door to the formats: a path is a folder of images, a .npz file, or MNIST's IDX files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from .dataset import Dataset, check
from .folder import load_folder
from .idx import PREFIXES, images_file, load_idx
from .npz import load_npz


def load_data(
    path: str | Path,
    *,
    split: str = "train",
    size: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Read a data set, whatever its format.

    Args:
        path: a folder of images (a class a sub-folder; see `load_folder`), a folder with MNIST's IDX files, one such
            file of images with its labels beside it, or a .npz file (see `load_npz`).
        split: "train" or "test": which of the IDX files, or of a .npz file's arrays; a folder of images has one split.
        size: cut every image to the square in its middle and resize it to so many pixels (bicubic, with antialiasing).
        say: is told in a line each what was done to the images or left out.

    Raises:
        FileNotFoundError: there is nothing at the path, or labels are missing.
        ValueError: the data is damaged, empty, of several sizes or of another format; the message names the file.
    """
    path = Path(path)
    if split not in PREFIXES:
        raise ValueError(f"split: expected one of {', '.join(PREFIXES)}, got {split!r}")
    if size is not None and size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}")
    if path.is_dir():
        images = images_file(path, split)
        if images is None and any(images_file(path, other) for other in PREFIXES):
            raise FileNotFoundError(f"{path} has IDX files, and none of the {split} split")
        if images is None:
            if split != "train":
                raise ValueError(f"{path} is a folder of images, which has no {split} split: name that split's folder")
            data = load_folder(path, size, say)
        else:
            data = _resized(load_idx(images), size, say)
    elif path.suffix == ".npz":
        data = _resized(load_npz(path, split), size, say)
    elif "ubyte" in path.name:
        data = _resized(load_idx(path), size, say)
    else:
        raise ValueError(f"{path}: expected a folder of images, a .npz file, or an IDX file (…-images-idx3-ubyte[.gz])")
    check(data, str(path))
    return data


def has_splits(path: str | Path) -> bool:
    """Whether a data set's files may have a split for training and one for testing: a folder of images is one split."""
    path = Path(path)
    return not path.is_dir() or any(images_file(path, split) for split in PREFIXES)


def _resized(data: Dataset, size: int | None, say: Callable[[str], None]) -> Dataset:
    """The images cut and resized as `load_folder` does it."""
    height, width = data.images.shape[2:]
    if size is None or (height, width) == (size, size):
        return data
    say(f"{len(data.images)} images of {width} x {height} are cut to the square in the middle, resized to {size}")
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    images = data.images[:, :, top : top + square, left : left + square]
    resized = torch.empty(len(images), images.shape[1], size, size, dtype=images.dtype)
    low, high = (0.0, 255.0) if images.dtype == torch.uint8 else (-1.0, 1.0)
    for part, into in zip(images.split(1024), resized.split(1024), strict=True):
        values = F.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True).clamp(low, high)
        into.copy_(values.round() if images.dtype == torch.uint8 else values)
    return data._replace(images=resized)
