"""What samplers take and what they share: the denoiser, the noise, the callback and the progress bar."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

#: D(x [N, C, *spatial], sigma [N]) -> the estimate of the clean sample.
DenoiserFunction = Callable[[Tensor, Tensor], Tensor]

#: noise(like, draw) -> standard normal noise of the shape, dtype and device of `like`; draws count from 1.
NoiseFunction = Callable[[Tensor, int], Tensor]

#: (alpha, beta) of `alpha · denoised + beta · z` at a level.
Renoise = Callable[[float], tuple[float, float]]

#: Called after each step with a dict: i, x, sigma, sigma_hat (after churn), denoised.
Callback = Callable[[dict[str, Any]], None]


class HostDenoiser(Protocol):
    """A denoiser may offer these methods as well: samplers then pass levels as host floats, which cost no launch."""

    def at(self, x: Tensor, sigma: float) -> Tensor:
        """D(x, sigma) with one level for the whole batch."""

    def step(
        self, x: Tensor, sigma: float, sigma_next: float, noise: NoiseFunction, draw: int
    ) -> tuple[Tensor, Tensor]:
        """(D(x, sigma), the same renoised to sigma_next) in one launch after the network."""

    def noising(self, sigma: float) -> tuple[float, float]:
        """(alpha, beta) of `alpha · D + beta · z` at the level sigma, for D of `at`."""


def evaluate(denoiser: DenoiserFunction, x: Tensor, sigma: float) -> Tensor:
    """D(x, sigma) with one host level for the whole batch."""
    at = getattr(denoiser, "at", None)
    if at is not None:
        return at(x, sigma)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return denoiser(x, torch.full(x.shape[:1], sigma, dtype=dtype, device=x.device))


def renoising(denoiser: DenoiserFunction, renoise: Renoise | None, sigma_min: float | None) -> Renoise:
    """How what a denoiser gives comes to a level again: as is asked, as the denoiser says, or as the paper does.

    Raises:
        ValueError: a sigma_min that is negative or not finite.
    """
    if sigma_min is not None and not 0.0 <= sigma_min < math.inf:
        raise ValueError(f"sigma_min must be at least 0 and finite, got {sigma_min}")
    if renoise is not None:
        return renoise
    own = getattr(denoiser, "noising", None)
    if own is not None and sigma_min is None:
        return own
    lowest = 0.002 if sigma_min is None else sigma_min
    return lambda sigma: (1.0, math.sqrt(max(sigma**2 - lowest**2, 0.0)))


def torch_noise(like: Tensor, draw: int) -> Tensor:
    """Noise of torch's global generator, what samplers use where they are given none."""
    return torch.randn_like(like)


def steps(count: int, progress: bool) -> Iterable[int]:
    """range(count), with a progress bar where it is asked for."""
    if not progress:
        return range(count)
    from tqdm.auto import tqdm

    return tqdm(range(count), desc="sampling", unit="step")


def report(
    callback: Callback | None, i: int, x: Tensor, sigma: float, denoised: Tensor, sigma_hat: float | None = None
) -> None:
    """Call the callback, if there is one."""
    if callback is not None:
        sigma_hat = sigma if sigma_hat is None else sigma_hat
        callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})
