"""The classifiers behind the quality measures, with the feature statistics of the real data."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import BUNDLED, CheckpointError, asset, first_line
from ..checkpoints.tensors import read_safetensors, write_safetensors
from ..files import whole_file

FEATURES = 64

#: Images of more pixels are pooled twice.
LARGE = 16


class Classifier(nn.Module):
    """A small convolutional network on samples [N, C, *spatial] in [-1, 1], with 64 features before its last layer.

    Images [N, C, size, size] of more than 16 pixels are pooled once more, after the first layer. So are sound and
    video, of any size (size None), which are divided by `scale` first, and averaged over all positions at last.

    Its buffers hold the mean [64] and covariance [64, 64] of the features of the real training and test sets, the
    references of the Fréchet distances.
    """

    scale: Tensor

    def __init__(self, channels: int = 1, size: int | None = 8, num_classes: int = 10, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.averaged, self.pool = size is None, (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
        self.conv1 = conv(channels, 32, 3, padding=1)
        self.conv2 = conv(32, 64, 3, padding=1)
        self.conv3 = conv(64, 64, 3, padding=1)
        if size is None:
            self.register_buffer("scale", torch.ones(()))
        positions = 1 if size is None else (size // (4 if size > LARGE else 2)) ** dims
        self.hidden = nn.Linear(64 * positions, FEATURES)
        self.out = nn.Linear(FEATURES, num_classes)
        for split in ("train", "test"):
            self.register_buffer(f"{split}_mean", torch.zeros(FEATURES))
            self.register_buffer(f"{split}_covariance", torch.zeros(FEATURES, FEATURES))

    def layers(self, images: Tensor) -> list[Tensor]:
        """The activations of its layers: of three convolutions [N, 32 or 64, *spatial], and the features [N, 64].

        Raises:
            ValueError: samples of other channels, dimensions or sizes than it was trained on.
        """
        _, channels, *kernel = self.conv1.weight.shape
        if images.ndim != 2 + len(kernel) or images.shape[1] != channels:
            wanted = ", ".join(["N", str(channels), *"DHW"[-len(kernel) :]])
            raise ValueError(f"the classifier is for samples [{wanted}], got {list(images.shape)}")
        first = F.relu(self.conv1(images / self.scale if self.averaged else images))
        h = self.pool(first, 2) if self.averaged or images.shape[-1] > LARGE else first
        second = F.relu(self.conv2(h))
        third = F.relu(self.conv3(self.pool(second, 2)))
        h = third.flatten(2).mean(2) if self.averaged else third.flatten(1)
        if h.shape[1] != self.hidden.in_features:
            raise ValueError(f"the classifier is for samples of another size, got {list(images.shape)}")
        return [first, second, third, F.relu(self.hidden(h))]

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer's activations [N, 64]; raises as `layers`."""
        return self.layers(images)[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        return self.out(F.dropout(self.features(images), 0.3, self.training))

    def statistics(self, split: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the real features; split is "train" or "test"."""
        return getattr(self, f"{split}_mean"), getattr(self, f"{split}_covariance")

    @torch.no_grad()
    def set_statistics(self, split: str, images: Tensor) -> None:
        """Compute the statistics of the real samples [M, C, *spatial], at least two, and keep them."""
        mean, covariance = feature_statistics(in_batches(self.features, images))
        getattr(self, f"{split}_mean").copy_(mean)
        getattr(self, f"{split}_covariance").copy_(covariance)


@torch.no_grad()
def in_batches(of: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 250) -> Tensor:
    """The features [M, D] that `of` gives of images [M, C, H, W], evaluated some at a time, on the CPU."""
    return torch.cat([of(part.float().cpu()) for part in images.split(batch_size)])


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [M, D], in float64.

    Raises:
        ValueError: fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"feature_statistics: expected the features of at least two samples, got {len(features)}")
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Write the weights (float16) and statistics (float32) as one safetensors file."""
    tensors = {
        name: value.to(torch.float32 if name.startswith(("train_", "test_")) else torch.float16).contiguous()
        for name, value in classifier.state_dict().items()
    }
    with whole_file(path) as file:
        write_safetensors(file, tensors)


def load_classifier(source: str | Path = "digits") -> Classifier:
    """Load the classifier of a bundled model, or one that `save_classifier` wrote.

    Args:
        source: a bundled model's name (a teacher's is its student's), or the path of a file.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        CheckpointError: the file is not such a classifier.
    """
    bundled = str(source) in BUNDLED
    path = asset(f"{str(source).removesuffix('-teacher')}-classifier.safetensors") if bundled else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no classifier at {path}")
    try:
        weights = {name: value.float() for name, value in read_safetensors(path).items()}
        num_classes, channels = weights["out.weight"].shape[0], weights["conv1.weight"].shape[1]
        dims, positions = weights["conv1.weight"].ndim - 2, weights["hidden.weight"].shape[1] // 64
        side = round(positions**0.5)  # after it was pooled once or twice
        size = 2 * side if 2 * side <= LARGE else 4 * side  # where both have it, they have the same weights
        classifier = Classifier(channels, size if dims == 2 else None, num_classes, dims).float()
        classifier.load_state_dict(weights)
    except (CheckpointError, KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a classifier written by cmfast: {first_line(error)}") from error
    return classifier.eval()
