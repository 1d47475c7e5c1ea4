"""The evaluation of a batch: samples of several requests at once, each the one that it would be alone."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..model import ConsistencyModel
from ..noise import GaussianNoise
from ..pictures import to_pixels
from ..sampling import SAMPLERS
from .batches import Batch, Piece


@dataclasses.dataclass(frozen=True)
class JoinedNoise:
    """The noise of a batch of pieces of several runs, as samplers take it: each piece has its own seed and indices.

    Attributes:
        pieces: in the order of the batch; samples after the last one have no noise.
    """

    pieces: Sequence[Piece]

    def __call__(self, like: Tensor, draw: int) -> Tensor:
        """Standard normal noise of the shape, dtype, device and memory format of `like` [N, C, *spatial]."""
        noise, begin = torch.zeros_like(like), 0
        for piece in self.pieces:
            part = noise[begin : begin + piece.count]
            part.copy_(GaussianNoise(piece.seed, piece.first_sample)(part, draw))
            begin += piece.count
        return noise


class Evaluator:
    """Evaluates batches of one model."""

    def __init__(self, model: ConsistencyModel, threads: int | None) -> None:
        """See `settings.ModelSettings` for the arguments. The number of threads is torch's from then on."""
        self.model = model.eval()
        if threads is not None:
            torch.set_num_threads(threads)

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Have all that evaluates batches of these sizes made."""
        level = self.model._plan(None, None, None, None, None)[1][0]
        for size in sizes:
            labels = None if self.model.num_classes is None else torch.zeros(size, dtype=torch.int64)
            x = torch.zeros(size, *self.model.sample_shape, dtype=self.model.state_dtype, device=self.model.device)
            with torch.no_grad():
                self.model.denoise(x, level, None if labels is None else labels.to(self.model.device))

    def __call__(self, batch: Batch) -> list[np.ndarray]:
        """The samples of each piece, [count, C, *spatial]: uint8 where it wants pixels, else float32."""
        with torch.no_grad():
            samples = self.model._sample_batch(
                SAMPLERS[batch.plan.sampler],
                batch.plan.levels,
                batch.size,
                JoinedNoise(batch.pieces),
                self._labels(batch),
            )
        found, begin = [], 0
        for piece in batch.pieces:
            part = samples[begin : begin + piece.count]
            found.append((to_pixels(part) if piece.pixels else part.float()).cpu().numpy())
            begin += piece.count
        return found

    def _labels(self, batch: Batch) -> Tensor | None:
        if self.model.num_classes is None:
            return None
        labels = [label for piece in batch.pieces for label in piece.labels or ()]
        return torch.tensor(labels + labels[-1:] * (batch.size - len(labels)), device=self.model.device)
