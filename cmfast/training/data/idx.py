"""IDX files, the format of MNIST and Fashion-MNIST: http://yann.lecun.com/exdb/mnist, plain or compressed by gzip."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset

#: The names that MNIST's files begin with, by the split.
PREFIXES = {"train": "train", "test": "t10k"}


def images_file(folder: Path, split: str) -> Path | None:
    """The file of a folder that has a split's images by MNIST's names; None where there is none."""
    for suffix in ("", ".gz"):
        for dash in ("-", "."):  # both spellings are about
            path = folder / f"{PREFIXES[split]}-images{dash}idx3-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def load_idx(path: Path) -> Dataset:
    """Read a file of images [M, H, W] of bytes, and the file of labels beside it: its name with "labels-idx1" in it.

    Raises:
        FileNotFoundError: there are no labels beside the images.
        ValueError: a file is no IDX file, is cut short, or is of something else; or the counts differ.
    """
    images = _read(path, dimensions=3)
    if "images" not in path.name:
        raise ValueError(f"{path}: expected a name with images-idx3-ubyte in it, such as train-images-idx3-ubyte.gz")
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels_path = next((p for p in (path.with_name(stem), path.with_name(f"{stem}.gz")) if p.is_file()), None)
    if labels_path is None:
        raise FileNotFoundError(f"{path} has no labels beside it: expected {stem} or {stem}.gz")
    labels = _read(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{path} has {len(images)} images, and {labels_path.name} {len(labels)} labels")
    if not images.size:
        raise ValueError(f"{path}: there are no images in it")
    return Dataset(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64)))


def _read(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file: two zero bytes, the type (8: uint8), the number of dimensions, the sizes, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    kind = f"an IDX file of unsigned bytes with {dimensions} dimension{'s' if dimensions > 1 else ''}"
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is not {kind}: it begins with {content[:4].hex(' ') or 'nothing'}")
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(sizes):
        raise ValueError(
            f"{path} is not whole: its header says {' x '.join(map(str, sizes))} bytes, it has {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
