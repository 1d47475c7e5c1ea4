"""Which samples an update sees."""

import torch
from torch import Tensor

from . import draws
from .data import Dataset, scaled


class Batches:
    """The batches of a run: each epoch goes through the data in an order of its own.

    The samples that are left at the end of an epoch, fewer than a batch, are left out of it. A batch is a function of
    the seed and the update's number alone.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, horizontal_flip: bool = False) -> None:
        """Take the data and the size of an update's whole batch.

        Raises:
            ValueError: a batch is to have more than there is, or nothing.
        """
        if not 1 <= batch_size <= len(data.labels):
            raise ValueError(f"batch_size: expected 1 … {len(data.labels)}, the data's length, got {batch_size}")
        self.data, self.batch_size, self.seed, self.horizontal_flip = data, batch_size, seed, horizontal_flip
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, iteration: int) -> Tensor:
        """The samples [batch_size] of an update."""
        epoch, batch = divmod(iteration, len(self.data.labels) // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, draws.order(self.seed, epoch, len(self.data.labels))
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def part(
        self, iteration: int, first: int = 0, count: int | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Images [count, C, *spatial] in [-1, 1] and labels [count] of an update's batch, from its sample `first` on.

        A GPU is not waited for.
        """
        count = self.batch_size - first if count is None else count
        chosen = self.indices(iteration)[first : first + count]
        images, labels = self.data.images[chosen], self.data.labels[chosen]
        flipped = draws.flips(self.seed, iteration, first, count) if self.horizontal_flip else None
        images, labels = scaled(_moved(images, device)), _moved(labels, device)
        if flipped is not None:
            flipped = _moved(flipped, device).reshape(-1, *(1,) * (images.ndim - 1))
            images = torch.where(flipped, images.flip(-1), images)
        return images, labels


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
