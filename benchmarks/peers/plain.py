"""The cmfast network in plain PyTorch operators, which exporters and compilers of other projects know."""

import contextlib
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from cmfast import unet


@contextlib.contextmanager
def plain_operators():
    """Within it, `cmfast.UNet` computes with torch.nn.functional instead of cmfast.kernels."""
    with mock.patch.object(unet, "group_norm", group_norm), mock.patch.object(unet, "attention", attention):
        yield


class FromEmbedding(nn.Module):
    """The plain network from the sinusoids of the timesteps on.

    An exported network that computes in bf16 rounds the times before it takes their sine: it would be off by radians.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, embedding, class_labels=None):
        """x [N, C, H, W], embedding [N, model_channels] in float32, class_labels [N]."""

        def timestep_embedding(timesteps, dim):
            return embedding

        with plain_operators(), mock.patch.object(unet, "timestep_embedding", timestep_embedding):
            return self.network(x, embedding[:, 0], class_labels)


def group_norm(x, num_groups, weight, bias, eps, *, add=None, scale=None, shift=None, activation=None):
    """The group norm that `cmfast.kernels.group_norm` defines."""
    if isinstance(x, tuple):
        x = torch.cat(x, dim=1)
    if add is not None:
        x = x + _per_channel(add)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + _per_channel(scale)) + _per_channel(shift)
    return F.silu(y) if activation == "silu" else y


def attention(q, k, v):
    """The attention that `cmfast.kernels.attention` defines."""
    return F.scaled_dot_product_attention(q, k, v)


def _per_channel(value):
    return value[:, :, None, None]
