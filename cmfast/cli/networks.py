"""The calls of cmfast's own networks that commands measure."""

import torch
from torch import nn

from ..unet import UNetConfig
from .user_network import Call


def evaluation(unet: nn.Module, batch_size: int) -> Call:
    """An evaluation of a network with UNet's forward and configuration, at a level in the middle."""
    config = unet.config
    assert isinstance(config, UNetConfig)
    like = next(unet.parameters())
    inputs = [like.new_empty(batch_size, *config.sample_shape).normal_(), like.new_full((batch_size,), 500.0)]
    if config.num_classes is not None:
        inputs.append(torch.arange(batch_size, device=like.device) % config.num_classes)
    return Call(unet, tuple(inputs), {})
