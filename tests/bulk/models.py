"""A model that is evaluated in no time, of samples of any shape."""

import torch
from torch import nn

from cmfast import ConsistencyModel, preconditioning


class Network(nn.Module):
    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, timesteps, class_labels=None):
        y = self.weight * x
        if class_labels is not None:
            y = y + 0.1 * class_labels.reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(y)


def model(shape=(1, 8, 8), classes=10, weight=0.5):
    return ConsistencyModel(Network(weight), preconditioning.Consistency(), sample_shape=shape, num_classes=classes)


def files(folder):
    """All that is in a folder: its files' bytes by their paths, and None for empty folders."""
    paths = sorted(folder.rglob("*"))
    content = {p: None if p.is_dir() else p.read_bytes() for p in paths if not p.is_dir() or not any(p.iterdir())}
    return {str(path.relative_to(folder)): data for path, data in content.items()}
