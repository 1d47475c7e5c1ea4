"""The cmfast network in plain PyTorch operators, which exporters and compilers of other projects know."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import unet


@contextlib.contextmanager
def plain_operators(attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Iterator[None]:
    """Within it, `cmfast.UNet` computes with torch.nn.functional instead of cmfast.kernels.

    `attend` takes the place of torch's attention: a function of q, k and v [N, H, T, D].
    """
    with (
        mock.patch.object(unet, "group_norm", group_norm),
        mock.patch.object(unet, "attention", attend or attention),
    ):
        yield


class FromEmbedding(nn.Module):
    """The plain network from the sinusoids of the timesteps on.

    An exported network that computes in bf16 rounds the times before it takes their sine: it would be off by radians.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, embedding: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """X [N, C, H, W], embedding [N, model_channels] in float32, class_labels [N]."""

        def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
            return embedding

        with plain_operators(), mock.patch.object(unet, "timestep_embedding", timestep_embedding):
            return self.network(x, embedding[:, 0], class_labels)


def group_norm(
    x: Any,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The group norm that `cmfast.kernels.group_norm` defines."""
    if isinstance(x, tuple):
        x = torch.cat(x, dim=1)
    if add is not None:
        x = x + _per_channel(add, x)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + _per_channel(scale, x)) + _per_channel(shift, x)
    return F.silu(y) if activation == "silu" else y


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention that `cmfast.kernels.attention` defines."""
    return F.scaled_dot_product_attention(q, k, v)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(*value.shape, *(1,) * (x.ndim - 2))
