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
    """Train a `Classifier` on shifted training images, round it to float16, and give it both sets' statistics.

    Adam (Kingma and Ba 2015) with a learning rate that falls linearly to 0; cross entropy with smoothed labels.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    classifier = Classifier(train.images.shape[1], train.images.shape[2], int(train.labels.max()) + 1).train()
    optimizer = torch.optim.Adam(classifier.parameters())
    batches = Batches(train, batch_size, seed)
    for iteration in range(iterations):
        images, labels = batches.part(iteration)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        loss = F.cross_entropy(classifier(torch.roll(images, shift, (2, 3))), labels, label_smoothing=0.05)
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
