"""Training of the classifier that measures samples."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..evaluation.classifier import Classifier
from .data import Dataset, batches
from .loop import optimize


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
    """Train a `Classifier` on shifted training images, round it to float16, and give it both sets' statistics."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    classifier = Classifier(train.images.shape[1], train.images.shape[2], int(train.labels.max()) + 1)
    source = batches(train, batch_size, generator)

    def loss() -> Tensor:
        images, labels = next(source)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        return F.cross_entropy(classifier(torch.roll(images, shift, (2, 3))), labels, label_smoothing=0.05)

    classifier.train()
    optimize(
        classifier,
        loss,
        iterations=iterations,
        optimizer=torch.optim.Adam(classifier.parameters(), lr=learning_rate),
        schedule=lambda fraction: 1.0 - fraction,
        clip=None,
        after_step=lambda: None,
        progress=progress,
    )
    classifier.eval().half().float()  # what is stored: the statistics must be those of the stored weights
    classifier.set_statistics("train", train.images)
    classifier.set_statistics("test", test.images)
    return classifier
