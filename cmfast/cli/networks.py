"""The calls of cmfast's own networks that commands measure."""

import torch
from torch import nn

from ..unet import UNet, UNetConfig
from .user_network import Call

_NETWORKS = {"imagenet64": UNetConfig.imagenet64, "lsun256": UNetConfig.lsun256}


def configuration(name: str) -> UNetConfig:
    """The configuration of a released network.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _NETWORKS:
        raise ValueError(f"--network must be one of {', '.join(_NETWORKS)}, got {name}")
    return _NETWORKS[name]()


def random_network(name: str, device: torch.device, dtype: torch.dtype) -> UNet:
    """A released network with weights drawn at random, in evaluation mode."""
    with torch.device("meta"):
        unet = UNet(configuration(name))
    unet = unet.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for p in unet.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.fill_(0.5)
    return unet.eval()


def evaluation(unet: nn.Module, batch_size: int) -> Call:
    """An evaluation of a network with UNet's forward and configuration, at a level in the middle."""
    config = unet.config
    assert isinstance(config, UNetConfig)
    like = next(unet.parameters())
    inputs = [like.new_empty(batch_size, *config.sample_shape).normal_(), like.new_full((batch_size,), 500.0)]
    if config.num_classes is not None:
        inputs.append(torch.arange(batch_size, device=like.device) % config.num_classes)
    return Call(unet, tuple(inputs), {})
