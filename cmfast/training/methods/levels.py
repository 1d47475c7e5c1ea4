"""Noise levels of a training batch, and samples at them. Levels are tensors [N] in a preconditioning's own unit."""

import torch
from torch import Tensor

from ...preconditioning import EDM, Flow, Preconditioning, TrigFlow
from .method import Draws


def one_per_sample(images: Tensor) -> Tensor:
    """A tensor [N] of the images' dtype and device, for `Draws` to take its shape from."""
    return images.flatten(1)[:, 0]


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Values [N] as [N, 1, …, 1], to be multiplied with x [N, C, *spatial]."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def log_normal(draws: Draws, images: Tensor, mean: float, std: float) -> Tensor:
    """Levels [N] whose logarithm is normal. Karras et al. 2022, table 1: ln sigma ~ N(mean, std²)."""
    return torch.exp(mean + std * draws.normal(one_per_sample(images)))


def uniform_index(draws: Draws, images: Tensor, count: int) -> Tensor:
    """Whole numbers [N], float64, each of 0 … count - 1 as likely as any other."""
    return (draws.uniform(one_per_sample(images)).double() * count).floor()


def karras_level(p: EDM, position: Tensor, like: Tensor) -> Tensor:
    """The level at a position in [0, 1] between sigma_min and sigma_max, evenly spaced in sigma^(1/rho).

    Karras et al. 2022, equation 5, counted from the lowest level: level i of n is at the position i / (n - 1).

    Args:
        p: has sigma_min, sigma_max and rho.
        position: of any shape, float64.
        like: gives the dtype of the result.
    """
    low, high = p.sigma_min ** (1.0 / p.rho), p.sigma_max ** (1.0 / p.rho)
    return ((low + position * (high - low)) ** p.rho).to(like.dtype)


def noised(p: Preconditioning, images: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """The sample of the forward process at the levels sigma [N]: that of which D(x, sigma) estimates `images`.

    images + sigma · noise for EDM and consistency models; cos(t) · images + sigma_data · sin(t) · noise with
    t = atan(sigma / sigma_data) for TrigFlow; (1 - sigma) · images + sigma · noise for flow.

    Raises:
        ValueError: a preconditioning on discrete timesteps.
    """
    if isinstance(p, TrigFlow):
        t = torch.atan(sigma.double() / p.sigma_data)
        signal, scale = torch.cos(t), p.sigma_data * torch.sin(t)
        return per_sample(signal.to(images.dtype), images) * images + per_sample(scale.to(images.dtype), images) * noise
    if isinstance(p, EDM):
        return images + per_sample(sigma, images) * noise
    if isinstance(p, Flow):
        return per_sample(1.0 - sigma, images) * images + per_sample(sigma, images) * noise
    raise ValueError(f"noised: expected continuous noise levels, got a {type(p).__name__} preconditioning")
