"""The networks that are measured, with weights drawn at random: times do not depend on them."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..unet import UNet, UNetConfig

Network = TypeVar("Network", bound=nn.Module)

#: The released networks, by name.
NETWORKS = {"imagenet64": UNetConfig.imagenet64, "lsun256": UNetConfig.lsun256}


def configuration(name: str) -> UNetConfig:
    """That of a released network.

    Raises:
        ValueError: there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"--network must be one of {', '.join(NETWORKS)}, got {name}")
    return NETWORKS[name]()


def random_network(config: UNetConfig, device: str, dtype: torch.dtype = torch.float32) -> UNet:
    """A network with `drawn` weights; in evaluation mode, without gradients."""
    with torch.device("meta"):
        unet = UNet(config)
    return drawn(unet, device).to(dtype)


def drawn(network: Network, device: str) -> Network:
    """A network without weights, with such that its values stay of order 1, drawn on the device.

    Matrices and kernels are normal numbers z divided by the root of their inputs, norms' weights 1 + 0.2 z, biases
    0.1 z.
    """
    network = network.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in network.named_parameters():
        p.normal_(generator=generator)
        if p.ndim > 1:
            p.div_(math.sqrt(p[0].numel()))
        elif name.endswith("weight"):
            p.mul_(0.2).add_(1)
        else:
            p.mul_(0.1)
    return network


def inputs(config: UNetConfig, device: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Samples x, timesteps and, of a conditional network, class labels."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, *config.sample_shape, generator=generator, device=device).to(dtype)
    timesteps = torch.linspace(-1000, 1000, batch, device=device)
    if config.num_classes is None:
        return x, timesteps
    return x, timesteps, torch.arange(batch, device=device) % config.num_classes
