"""Training of the classifier that measures samples."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..evaluation.classifier import Classifier
from .batches import Batches
from .data import Dataset


def train_classifier(
    train: Dataset,
    test: Dataset,
    *,
    iterations: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Classifier:
    """Train a `Classifier` on shifted training samples, round it to float16, and give it both sets' statistics.

    Each is shifted by one position at most, along the last two of its dimensions.

    Adam (Kingma and Ba 2015) with a learning rate that falls linearly to 0; cross entropy with smoothed labels.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    _, channels, *spatial = train.images.shape
    size = spatial[0] if len(spatial) == 2 else None
    classifier = Classifier(channels, size, int(train.labels.max()) + 1, len(spatial)).train()
    if classifier.averaged:
        classifier.scale.fill_(train.images.std())
    moved = tuple(range(train.images.ndim - min(len(spatial), 2), train.images.ndim))
    optimizer = torch.optim.Adam(classifier.parameters())
    batches = Batches(train, batch_size, seed)
    for iteration in range(iterations):
        images, labels = batches.part(iteration)
        shift = torch.randint(-1, 2, (len(moved),), generator=generator).tolist()
        loss = F.cross_entropy(classifier(torch.roll(images, shift, moved)), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1.0 - iteration / iterations)
        optimizer.step()
        if progress is not None:
            progress(iteration, loss.item())
    classifier.eval().half().float()  # what is stored: the statistics must be those of the stored weights
    classifier.set_statistics("train", train.images)
    classifier.set_statistics("test", test.images)
    return classifier
