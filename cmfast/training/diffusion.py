"""Training of EDM diffusion models, the teachers. Karras et al. 2022, table 1 and appendix F."""

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..model import ConsistencyModel
from ..preconditioning import EDM
from .data import Dataset, batches
from .loop import RunningAverage, optimize


@dataclasses.dataclass(frozen=True)
class DiffusionTraining:
    """Settings of `train_diffusion`.

    Attributes:
        iterations: updates.
        batch_size: images an update.
        learning_rate: of Adam; decays to 0 along a cosine.
        log_sigma_mean: mean of ln(sigma) in training.
        log_sigma_std: its standard deviation.
        ema_decay: of the averaged weights.
        seed: of batches, levels and noise.
    """

    iterations: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    ema_decay: float = 0.999
    seed: int = 0


def train_diffusion(
    model: ConsistencyModel,
    data: Dataset,
    settings: DiffusionTraining,
    progress: Callable[[int, float], None] | None = None,
) -> ConsistencyModel:
    """Train `model` (with EDM preconditioning) in place, and return a copy with averaged weights.

    Args:
        model: freshly initialised, or one to go on from.
        data: the training set.
        settings: see there.
        progress: called with (iteration, loss) after each update.

    Raises:
        ValueError: the model's preconditioning is not EDM.
    """
    if type(model.preconditioning) is not EDM:
        raise ValueError(
            f"train_diffusion: expected an EDM preconditioning, got {type(model.preconditioning).__name__}"
        )
    s, sigma_data = settings, model.preconditioning.sigma_data
    generator = torch.Generator().manual_seed(s.seed)
    source = batches(data, s.batch_size, generator)
    average = RunningAverage(model, s.ema_decay)

    def loss() -> Tensor:
        images, labels = next(source)
        sigma = torch.exp(s.log_sigma_mean + s.log_sigma_std * torch.randn(len(labels), generator=generator))
        noise = torch.randn(images.shape, generator=generator)
        per_sample = (-1, *(1,) * (images.ndim - 1))
        classes = labels if model.num_classes else None
        denoised = model.denoise(images + sigma.reshape(per_sample) * noise, sigma, classes)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        return (weight.reshape(per_sample) * (denoised - images) ** 2).mean()

    model.train()
    optimize(
        model,
        loss,
        iterations=s.iterations,
        optimizer=torch.optim.Adam(model.parameters(), lr=s.learning_rate),
        schedule=lambda fraction: 0.5 * (1.0 + math.cos(math.pi * fraction)),
        clip=None,
        after_step=lambda: average.update(model),
        progress=progress,
    )
    return cast(ConsistencyModel, average.model)
