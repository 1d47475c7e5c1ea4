"""Samplers of consistency models: one evaluation, or a few with fresh noise between them."""

from collections.abc import Sequence

from torch import Tensor

from .protocol import (
    Callback,
    DenoiserFunction,
    NoiseFunction,
    Renoise,
    evaluate,
    renoising,
    report,
    steps,
    torch_noise,
)
from .schedules import host_levels


def sample_onestep(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """One evaluation at the first level: x0 = D(x, sigmas[0]). Song et al. 2023, algorithm 1 without its loop.

    Args:
        denoiser: D(x, sigma [N]).
        x: [N, C, *spatial], noise of standard deviation sigmas[0].
        sigmas: decreasing levels, of which the first is used; the last of several may be 0.
        noise: not used; every sampler takes it.
        callback: called once (see `cmfast.sampling.protocol`).
        progress: not used; there is one step.

    Raises:
        ValueError: levels that do not decrease, or are not positive but for a final 0 of several.
    """
    sigma = host_levels(sigmas, final_zero=len(sigmas) > 1)[0]
    denoised = evaluate(denoiser, x, sigma)
    report(callback, 0, denoised, sigma, denoised)
    return denoised


def sample_multistep(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    renoise: Renoise | None = None,
    sigma_min: float | None = None,
) -> Tensor:
    """Multistep consistency sampling: denoise, renoise to the next level, and again. Song et al. 2023, algorithm 1.

    Args:
        denoiser: D(x, sigma [N]).
        x: [N, C, *spatial], noise of standard deviation sigmas[0].
        sigmas: the decreasing, positive levels at which the model is evaluated.
        noise: draw i brings the sample to sigmas[i]; None means torch's global generator.
        callback: called after each step (see `cmfast.sampling.protocol`).
        progress: show a progress bar.
        renoise: (alpha, beta) of `alpha · denoised + beta · z` at the next level; None means what the denoiser's own
            methods do, those of `HostDenoiser`, and 1, √(sigma² - sigma_min²) of one without them.
        sigma_min: the level at which the denoised sample stands, for 1, √(sigma² - sigma_min²); 0.002 by default.

    Raises:
        ValueError: levels that do not decrease, or are not positive, or a sigma_min that is negative or not finite.
    """
    levels, noise = host_levels(sigmas, final_zero=False), noise or torch_noise
    fused_step = getattr(denoiser, "step", None) if renoise is None and sigma_min is None else None
    renoise = renoising(denoiser, renoise, sigma_min)
    for i in steps(len(levels), progress):
        if i == len(levels) - 1:
            x = denoised = evaluate(denoiser, x, levels[i])
        elif fused_step is not None:
            denoised, x = fused_step(x, levels[i], levels[i + 1], noise, i + 1)
        else:
            denoised = evaluate(denoiser, x, levels[i])
            alpha, beta = renoise(levels[i + 1])
            x = alpha * denoised + beta * noise(x, i + 1)
        report(callback, i, x, levels[i], denoised)
    return x
