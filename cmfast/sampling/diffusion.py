"""Diffusion samplers: the baseline that consistency models are measured against.

All solve the probability-flow ODE dx/dσ = (x - D(x, σ)) / σ, or a stochastic version of it, along a grid of levels that
ends in 0 (`karras_sigmas`). Shapes, arguments and errors are the same for all:

    denoiser: D(x, sigma [N]) -> [N, C, *spatial].
    x: [N, C, *spatial], noise of standard deviation sigmas[0].
    sigmas: decreasing host floats (or a tensor, read once).
    noise: noise(like, draw), standard normal; draw i + 1 belongs to step i. None means torch's global generator.
    callback, progress: see `cmfast.sampling.protocol`.
    Returns the sample [N, C, *spatial] in the dtype of x.
    Raises ValueError for levels that do not decrease.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .protocol import Callback, DenoiserFunction, NoiseFunction, evaluate, report, steps, torch_noise
from .schedules import host_levels


def sample_euler(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Euler's method, one evaluation a step; the same numbers as deterministic DDIM. Karras et al. 2022, section 3.

    Arguments, result and errors: as the module `cmfast.sampling.diffusion` has them.
    """
    levels = host_levels(sigmas, final_zero=True)
    for i in steps(len(levels) - 1, progress):
        denoised = evaluate(denoiser, x, levels[i])
        x = _euler_step(x, denoised, levels[i], levels[i + 1])
        report(callback, i, x, levels[i], denoised)
    return x


def sample_heun(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order method, two evaluations a step but for the last. Karras et al. 2022, algorithms 1 and 2.

    s_churn, s_tmin, s_tmax and s_noise are the paper's: the amount of noise added before each step whose level is in
    [s_tmin, s_tmax], and its standard deviation.

    Raises:
        ValueError: one of these that is not a number, an s_noise that is not finite, or levels that do not decrease.
    """
    levels = host_levels(sigmas, final_zero=True)
    for i in steps(len(levels) - 1, progress):
        sigma_next = levels[i + 1]
        x, sigma = _churn(x, levels, i, noise, s_churn, s_tmin, s_tmax, s_noise)
        denoised = evaluate(denoiser, x, sigma)
        if sigma_next == 0.0:
            x = _euler_step(x, denoised, sigma, sigma_next)
        else:
            slope = (x - denoised) / sigma
            predicted = x + (sigma_next - sigma) * slope
            slope_next = (predicted - evaluate(denoiser, predicted, sigma_next)) / sigma_next
            x = x + (sigma_next - sigma) * 0.5 * (slope + slope_next)
        report(callback, i, x, levels[i], denoised, sigma)
    return x


def sample_dpm2(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """A midpoint method like DPM-Solver-2, two evaluations a step (Lu et al. 2022, algorithm 1).

    The midpoint is chosen on a Karras grid of rho = 3. The churn arguments and errors are those of `sample_heun`.
    """
    levels = host_levels(sigmas, final_zero=True)
    for i in steps(len(levels) - 1, progress):
        x, sigma = _churn(x, levels, i, noise, s_churn, s_tmin, s_tmax, s_noise)
        denoised = evaluate(denoiser, x, sigma)
        sigma_mid = ((sigma ** (1 / 3) + levels[i + 1] ** (1 / 3)) / 2) ** 3
        middle = _euler_step(x, denoised, sigma, sigma_mid)
        slope = (middle - evaluate(denoiser, middle, sigma_mid)) / sigma_mid
        x = x + (levels[i + 1] - sigma) * slope
        report(callback, i, x, levels[i], denoised, sigma)
    return x


def sample_dpmpp_2m(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """DPM-Solver++(2M), second order with one evaluation a step. Lu et al. 2022b, algorithm 2."""
    levels = host_levels(sigmas, final_zero=True)
    previous: Tensor | None = None
    for i in steps(len(levels) - 1, progress):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = evaluate(denoiser, x, sigma)
        extrapolated = denoised
        if previous is not None and sigma_next > 0.0:
            # half the ratio of this step's length to the last one's, in log sigma
            half_ratio = 0.5 * math.log(sigma / sigma_next) / math.log(levels[i - 1] / sigma)
            extrapolated = (1.0 + half_ratio) * denoised - half_ratio * previous
        ratio = sigma_next / sigma
        x = ratio * x + (1.0 - ratio) * extrapolated
        previous = denoised
        report(callback, i, x, sigma, denoised)
    return x


def sample_ddim(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, one evaluation a step. Song et al. 2020, equations 12 and 16, in terms of sigma.

    eta = 0 is deterministic, and then Euler's method; eta = 1 is ancestral (DDPM) sampling.

    Raises:
        ValueError: an eta that is not in [0, 1], or levels that do not decrease.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta}")
    levels, noise = host_levels(sigmas, final_zero=True), noise or torch_noise
    for i in steps(len(levels) - 1, progress):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = evaluate(denoiser, x, sigma)
        sigma_up = eta * sigma_next * math.sqrt(1.0 - (sigma_next / sigma) ** 2)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = _euler_step(x, denoised, sigma, sigma_down)
        if sigma_up > 0.0:
            x = x + sigma_up * noise(x, i + 1)
        report(callback, i, x, sigma, denoised)
    return x


def sample_ancestral(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Ancestral sampling: an Euler step below the next level, then noise up to it. Ho et al. 2020, algorithm 2."""
    return sample_ddim(denoiser, x, sigmas, noise=noise, callback=callback, progress=progress, eta=1.0)


def sample_progdist(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Euler steps that stop at the last positive level, for progressively distilled models. Salimans and Ho 2022.

    n steps take a grid of n + 1 levels and the final 0, which is dropped.
    """
    levels = host_levels(sigmas, final_zero=True)
    levels = levels[:-1] if levels[-1] == 0.0 else levels
    return sample_euler(denoiser, x, levels, noise=noise, callback=callback, progress=progress)


def _euler_step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    return x + (sigma_next - sigma) / sigma * (x - denoised)


def _churn(
    x: Tensor,
    levels: list[float],
    i: int,
    noise: NoiseFunction | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> tuple[Tensor, float]:
    """Raise step i's level by added noise: Karras et al. 2022, algorithm 2, lines 4 to 6."""
    if any(map(math.isnan, (s_churn, s_tmin, s_tmax))) or not math.isfinite(s_noise):
        raise ValueError(
            f"s_churn, s_tmin and s_tmax must be numbers and s_noise finite, got {s_churn}, {s_tmin}, {s_tmax} and "
            f"{s_noise}"
        )
    sigma = levels[i]
    if s_churn <= 0.0:
        return x, sigma
    z = (noise or torch_noise)(x, i + 1)  # outside the window too: a stateful noise stays in step, as published
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    sigma_hat = sigma * (1.0 + min(s_churn / (len(levels) - 1), math.sqrt(2.0) - 1.0))
    return x + s_noise * math.sqrt(sigma_hat**2 - sigma**2) * z, sigma_hat
