"""PyTorch as it is, in its channels-last memory format."""

import torch

from . import with_torch

PACKAGES = ("torch",)
DEVICES = ("cpu", "cuda")


def prepare(case, folder):
    return with_torch.prepare(case, folder, torch.channels_last)
