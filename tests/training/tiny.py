"""A network, a method and data of which an update takes a millisecond."""

import os
import sys
import traceback

import pytest
import torch
from torch import nn

from cmfast import ConsistencyModel
from cmfast.preconditioning import EDM
from cmfast.training import Dataset
from cmfast.training.averages import average_into, averaged_copy
from cmfast.training.methods.method import Method


class Network(nn.Module):
    """Two convolutions with classes and dropout; it has a buffer too."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.classes = nn.Embedding(2, 4)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, timesteps, class_labels=None):
        if self.training:
            self.seen += 1
        h = self.first(x) + timesteps.reshape(-1, 1, 1, 1).to(x.dtype) / 1000
        if class_labels is not None:
            h = h + self.classes(class_labels)[:, :, None, None]
        return self.second(self.dropout(torch.tanh(h)))


class Denoising(Method):
    """The squared error at uniform levels, against data and a target network; it counts its updates."""

    def __init__(self, dropout=0.0, num_classes=2, poison=None):
        torch.manual_seed(0)
        self.model = ConsistencyModel(Network(dropout), EDM(), sample_shape=(1, 4, 4), num_classes=num_classes)
        self.target, self.count, self.poison = averaged_copy(self.model), 0, poison
        self.settings = None

    @classmethod
    def student(cls, source):
        return source

    def loss(self, images, labels, draws, iteration):
        sigma = 0.1 + draws.uniform(images[:, 0, 0, 0])
        x = images + sigma[:, None, None, None] * draws.normal(images)
        wanted = images + 0.1 * self.target.denoise(x, sigma, labels)
        losses = (self.model.denoise(x, sigma, labels) - wanted).square().flatten(1).mean(1)
        return losses * float("nan") if iteration == self.poison else losses

    def updated(self, iteration):
        self.count += 1
        average_into(self.target, self.model, 0.9)

    def networks(self):
        return {"target": self.target}

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"]


def data(count=10):
    generator = torch.Generator().manual_seed(1)
    return Dataset(torch.rand(count, 1, 4, 4, generator=generator) * 2 - 1, torch.arange(count) % 2)


def weights(trained):
    """All that a training gives, by name."""
    models = {"model": trained.model, **trained.averages}
    return {f"{name}.{key}": v for name, model in models.items() for key, v in model.state_dict().items()}


def same(first, second):
    """Whether two results of `weights` are the same to the bit."""
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def forked(function):
    """Run the function in a fork, whose process this gives."""
    if torch.cuda.is_available():
        pytest.skip("autograd has threads for the GPU, which a fork does not take along")
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(process):
    """Wait for a fork; gives its exit status, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
