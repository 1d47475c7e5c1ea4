"""A network of three operations whose twin is written in Python's floats, and random numbers that are given."""

import math

import torch
from torch import nn

from cmfast import ConsistencyModel

#: Samples of four elements with their noise, as lists of floats, and their labels.
IMAGES = [[0.3, -0.8, 0.1, 0.9], [-0.2, 0.5, -1.0, 0.4], [0.7, 0.6, -0.3, -0.9]]
NOISE = [[1.2, -0.4, 0.7, -2.1], [-0.3, 0.9, 1.6, -0.5], [0.2, -1.3, -0.6, 1.1]]
LABELS = [0, 1, 1]
#: Standard normal and uniform numbers, one a sample.
NORMALS = [-1.3, 0.2, 1.7]
UNIFORMS = [0.05, 0.62, 0.97]

WEIGHTS = (0.4, 0.9, 0.05)
OTHER_WEIGHTS = (0.7, 0.3, 0.03)


class Toy(nn.Module):
    """F(x, t, label) = w0 x + w1 sin(x + w2 t) + label / 10, element by element."""

    def __init__(self, weights=WEIGHTS):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, x, timesteps, class_labels):
        t, label = (v.to(x.dtype).reshape(-1, 1, 1, 1) for v in (timesteps, class_labels))
        return self.w[0] * x + self.w[1] * torch.sin(x + self.w[2] * t) + label / 10


def toy(x, t, label, weights=WEIGHTS):
    return weights[0] * x + weights[1] * math.sin(x + weights[2] * t) + label / 10


def edm(x, sigma, label, weights=WEIGHTS):
    """The denoiser of one element. Karras et al. 2022, table 1."""
    total = sigma**2 + 0.25
    f = toy(x / math.sqrt(total), 250 * math.log(sigma), label, weights)
    return 0.25 / total * x + sigma * 0.5 / math.sqrt(total) * f


def consistency(x, sigma, label, weights=WEIGHTS):
    """The consistency function of one element. Song et al. 2023, appendix C."""
    total = sigma**2 + 0.25
    f = toy(x / math.sqrt(total), 250 * math.log(sigma), label, weights)
    return 0.25 / ((sigma - 0.002) ** 2 + 0.25) * x + (sigma - 0.002) * 0.5 / math.sqrt(total) * f


def karras(number, count):
    """Level `number` of `count`, from 0.002 up to 80. Karras et al. 2022, equation 5."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (low + number / (count - 1) * (high - low)) ** 7


def model(preconditioning, weights=WEIGHTS):
    return ConsistencyModel(Toy(weights), preconditioning, sample_shape=(1, 2, 2), num_classes=2)


def images():
    return torch.tensor(IMAGES, dtype=torch.float64).reshape(3, 1, 2, 2)


def labels():
    return torch.tensor(LABELS)


class Given:
    """`Draws` of the numbers above: those of the samples' shape are NOISE."""

    def __init__(self):
        self.calls = []

    def normal(self, like):
        self.calls.append(("normal", *like.shape))
        values = torch.tensor(NORMALS if like.ndim == 1 else NOISE, dtype=torch.float64)
        return values.to(like).reshape(like.shape)

    def uniform(self, like):
        self.calls.append(("uniform", *like.shape))
        return torch.tensor(UNIFORMS, dtype=torch.float64).to(like).reshape(like.shape)


def losses(method, iteration=0, draws=None):
    """The loss of each sample, as floats."""
    found = method.loss(images(), labels(), draws or Given(), iteration)
    assert found.shape == (3,)
    assert found.dtype == torch.float64
    return found.tolist()
