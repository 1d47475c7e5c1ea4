"""What every source of data is read into: samples with their classes."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Dataset(NamedTuple):
    """Samples in memory, with their classes.

    Attributes:
        images: [M, C, *spatial], float32 in [-1, 1]; or uint8, 0 … 255, a quarter of the memory, which is mapped to
            [-1, 1] as batches are drawn.
        labels: the class of each [M], int64, from 0; all 0 where there are none.
        class_names: what the classes are called, where that is known.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None where there is one alone, which tells samples nothing."""
        count = max(len(self.class_names), int(self.labels.max()) + 1)
        return count if count > 1 else None


def scaled(images: Tensor) -> Tensor:
    """Images as training takes them: uint8 is mapped to [-1, 1] in float32, floating-point images are as they were."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images


def check(data: Dataset, name: str = "data") -> None:
    """Raise ValueError where the tensors are not those of a data set, or do not belong together."""
    images, labels = data.images, data.labels
    if images.dtype not in (torch.float32, torch.uint8) or images.ndim < 3:
        raise ValueError(
            f"{name}: expected images [M, C, *spatial], float32 or uint8, got {list(images.shape)} {images.dtype}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected {len(images)} labels, int64, one for each image, got {list(labels.shape)} {labels.dtype}"
        )
    if not len(images):
        raise ValueError(f"{name}: there are no images")
    if int(labels.min()) < 0:
        raise ValueError(f"{name}: labels count from 0, got {int(labels.min())}")
    last, distinct = int(labels.max()), len(labels.unique())
    if last >= max(1000, 100 * distinct):  # a part of 1,000 classes is one thing, identities are another
        raise ValueError(
            f"{name}: labels count the classes from 0, and these {distinct} go up to {last}: a model would have so "
            "many classes; number them anew"
        )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors' shapes, dtypes and bytes (BLAKE2b, 16 bytes in hexadecimal; about a second for 1 GB)."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
