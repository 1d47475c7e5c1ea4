"""Editing of images, audio and video with a consistency model that was not trained for it.

Song et al. 2023, "Consistency Models", section 6 and algorithm 4: after each evaluation, what is known of the sample is
put back into it, before it is renoised to the next level. What is known is a projection of the sample: some of its
positions, the weighted mean of its channels, or the means of its patches. The samples are those of `denoiser(x, sigma)`
[N, C, *spatial], as everywhere in `cmfast.sampling`; for latents give clip=None.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import consistency_step
from ..noise import noise_arguments
from ..pooling import average_pool
from .consistency import sample_multistep
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

#: The weights of red, green and blue in the luma of a picture (ITU-R BT.601).
LUMA = (0.2989, 0.5870, 0.1140)


def inpaint(
    denoiser: DenoiserFunction,
    known: Tensor,
    mask: Tensor,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    clip: float | None = 1.0,
    renoise: Renoise | None = None,
    sigma_min: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Fill in what is missing of a sample. What is known is in the result bit for bit.

    Args:
        denoiser: D(x, sigma [N]).
        known: [N or 1, C, *spatial]; its values where the mask is 0 do not matter, and may be NaN.
        mask: 1 or True where the sample is known, 0 where it is to be filled in; of a shape that broadcasts to that of
            x, such as [H, W].
        x: [N, C, *spatial], noise of standard deviation sigmas[0].
        sigmas: the decreasing, positive levels at which the model is evaluated.
        noise: draw i brings the sample to sigmas[i]; None means torch's global generator.
        clip: bound of each evaluation's absolute value, which is positive; None does not clip.
        renoise: (alpha, beta) of `alpha · denoised + beta · z` at the next level; None means the model's own where the
            denoiser is `model.denoiser()`, else 1, √(sigma² - sigma_min²).
        sigma_min: the level at which the denoised sample stands, for 1, √(sigma² - sigma_min²); 0.002 by default.
        callback: called after each step (see `cmfast.sampling.protocol`).
        progress: show a progress bar.

    Returns:
        [N, C, *spatial] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, a mask of other values than 0 and 1, a clip or sigma_min that is out of
            range, or levels that do not decrease.
    """
    known = _like("inpaint: known", known, x)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("inpaint: the mask must be 1 where the sample is known and 0 elsewhere, got other values")
    where = _like("inpaint: mask", mask, x) != 0
    put_back = lambda denoised: torch.where(where, known, denoised)  # noqa: E731
    return _edit(denoiser, put_back, x, sigmas, noise, clip, renoise, sigma_min, callback, progress)


def colorize(
    denoiser: DenoiserFunction,
    known: Tensor,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    weights: Sequence[float] = LUMA,
    noise: NoiseFunction | None = None,
    clip: float | None = 1.0,
    renoise: Renoise | None = None,
    sigma_min: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Colour a grey picture: the weighted sum of the result's channels is that of the given picture's.

    Args:
        denoiser: D(x, sigma [N]).
        known: [N or 1, 1, *spatial], a grey picture, or [N or 1, C, *spatial], of which the sum over channels is used.
        x: [N, C, *spatial], noise of standard deviation sigmas[0].
        sigmas: the decreasing, positive levels at which the model is evaluated.
        weights: C weights of the channels, of which at least one is not 0; by default those of red, green and blue in
            the luma.
        noise: see `inpaint`, also for the arguments after it.
        clip: bound of each evaluation's absolute value, before its luma is put back.
        renoise: see `inpaint`.
        sigma_min: see `inpaint`.
        callback: see `inpaint`.
        progress: see `inpaint`.

    Returns:
        [N, C, *spatial] in the dtype of x.

    Raises:
        ValueError: shapes, weights or a clip that do not fit, or levels that do not decrease.
    """
    if len(weights) != x.shape[1]:
        raise ValueError(f"colorize: expected a weight for each of {x.shape[1]} channels, got {tuple(weights)}")
    if not 0.0 < math.hypot(*map(float, weights)) < math.inf:
        raise ValueError(f"colorize: weights must be finite, and not all 0, got {tuple(weights)}")
    known = _like("colorize: known", known, x)
    direction = torch.tensor(list(weights), dtype=x.dtype, device=x.device)
    direction = (direction / direction.norm()).reshape(-1, *(1,) * (x.ndim - 2))

    def along(t: Tensor) -> Tensor:
        return (t * direction).sum(1, keepdim=True) * direction

    grey = along(known)
    put_back = lambda denoised: denoised + (grey - along(denoised))  # noqa: E731
    return _edit(denoiser, put_back, x, sigmas, noise, clip, renoise, sigma_min, callback, progress)


def super_resolve(
    denoiser: DenoiserFunction,
    known: Tensor,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    factor: int,
    noise: NoiseFunction | None = None,
    clip: float | None = 1.0,
    renoise: Renoise | None = None,
    sigma_min: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Enlarge a picture, a clip or a sound: the means of the result's patches are the given one's values.

    Args:
        denoiser: D(x, sigma [N]).
        known: [N or 1, C, *spatial / factor], rounded up; or of the size of x, of which the patches' means are used.
        x: [N, C, *spatial], noise of standard deviation sigmas[0].
        sigmas: the decreasing, positive levels at which the model is evaluated.
        factor: edge of a patch, at least 2. Where it does not divide a size, the last patches are smaller.
        noise: see `inpaint`, also for the arguments after it.
        clip: bound of each evaluation's absolute value, before the means are put back.
        renoise: see `inpaint`.
        sigma_min: see `inpaint`.
        callback: see `inpaint`.
        progress: see `inpaint`.

    Returns:
        [N, C, *spatial] in the dtype of x.

    Raises:
        ValueError: shapes, a factor or a clip that do not fit, or levels that do not decrease.
    """
    if not isinstance(factor, numbers.Integral) or factor < 2:
        raise ValueError(f"super_resolve: factor must be a whole number of at least 2, got {factor}")
    spatial = x.shape[2:]
    small = [-(-size // factor) for size in spatial]
    if list(known.shape[2:]) == small:
        known = _enlarged(_like("super_resolve: known", known, x, small), factor, spatial)
    else:
        known = _patch_means(_like("super_resolve: known", known, x, spatial, small), factor)
    put_back = lambda denoised: denoised + (known - _patch_means(denoised, factor))  # noqa: E731
    return _edit(denoiser, put_back, x, sigmas, noise, clip, renoise, sigma_min, callback, progress)


def edit_strokes(
    denoiser: DenoiserFunction,
    known: Tensor,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    noise: NoiseFunction | None = None,
    renoise: Renoise | None = None,
    sigma_min: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Make a sample of a rough drawing: it is noised to the first level and sampled from there.

    Meng et al. 2022, "SDEdit", with the sampler of Song et al. 2023, figure 6. A high first level gives a sample that
    is more real, a low one a sample that is closer to the drawing.

    Args:
        denoiser: D(x, sigma [N]).
        known: [N or 1, C, *spatial], the drawing.
        x: [N, C, *spatial], noise of standard deviation sigmas[0].
        sigmas: the decreasing, positive levels at which the model is evaluated.
        noise: see `inpaint`, also for the arguments after it.
        renoise: see `inpaint`.
        sigma_min: see `inpaint`.
        callback: see `inpaint`.
        progress: see `inpaint`.

    Returns:
        [N, C, *spatial] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or levels that do not decrease.
    """
    levels = host_levels(sigmas, final_zero=False)
    alpha, _ = renoising(denoiser, renoise, sigma_min)(levels[0])
    start = alpha * _like("edit_strokes: known", known, x) + x
    given: dict[str, Any] = {
        "noise": noise,
        "renoise": renoise,
        "sigma_min": sigma_min,
        "callback": callback,
        "progress": progress,
    }
    return sample_multistep(denoiser, start, levels, **given)


def interpolate(
    denoiser: DenoiserFunction,
    first: Tensor,
    second: Tensor,
    sigmas: Sequence[float] | Tensor,
    *,
    weights: Sequence[float],
    noise: NoiseFunction | None = None,
    renoise: Renoise | None = None,
    sigma_min: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Go from one sample to another: sample from noise that lies between theirs on a sphere.

    Song et al. 2023, section 6 and figure 11.

    Args:
        denoiser: D(x, sigma [N]), N the number of weights.
        first: [C, *spatial], noise of standard deviation sigmas[0].
        second: [C, *spatial], other noise of that level.
        sigmas: the decreasing, positive levels at which the model is evaluated. With more than one, give `noise` the
            same numbers for all samples, or each jumps to details of its own.
        weights: of the second, one a sample: 0 is the first, 1 the second. They are finite.
        noise: see `inpaint`, also for the arguments after it.
        renoise: see `inpaint`.
        sigma_min: see `inpaint`.
        callback: see `inpaint`.
        progress: see `inpaint`.

    Returns:
        [N, C, *spatial].

    Raises:
        ValueError: shapes or weights that do not fit, or levels that do not decrease.
    """
    given: dict[str, Any] = {
        "noise": noise,
        "renoise": renoise,
        "sigma_min": sigma_min,
        "callback": callback,
        "progress": progress,
    }
    return sample_multistep(denoiser, between(first, second, weights), sigmas, **given)


def between(first: Tensor, second: Tensor, weights: Sequence[float]) -> Tensor:
    """Spherical linear interpolation of two tensors: [N, …] for N weights of the second.

    With ψ the angle between them, (sin((1 - w) ψ) first + sin(w ψ) second) / sin ψ (Shoemake 1985); their linear
    interpolation where they lie along one line, or one of them is 0.

    Raises:
        ValueError: tensors of two shapes, no weights, or weights that are not finite.
    """
    if first.shape != second.shape or not len(weights):
        raise ValueError(
            f"interpolate: expected two tensors of one shape and at least one weight, got {list(first.shape)}, "
            f"{list(second.shape)} and {len(weights)} weights"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"interpolate: weights must be finite, got {tuple(weights)}")
    wide = torch.float64
    w = torch.tensor(list(weights), dtype=wide, device=first.device).reshape(-1, *(1,) * first.ndim)
    a, b = first.to(wide), second.to(wide)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))
    sine = torch.sin(angle)
    along_line = ~(sine >= 1e-6)  # NaN where one of them is 0
    of_first = torch.where(along_line, 1 - w, torch.sin((1 - w) * angle) / sine)
    of_second = torch.where(along_line, w, torch.sin(w * angle) / sine)
    return (of_first * a + of_second * b).to(first.dtype)


def _edit(
    denoiser: DenoiserFunction,
    put_back: Callable[[Tensor], Tensor],
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    noise: NoiseFunction | None,
    clip: float | None,
    renoise: Renoise | None,
    sigma_min: float | None,
    callback: Callback | None,
    progress: bool,
) -> Tensor:
    """Algorithm 4: denoise, put back what is known, renoise to the next level, and again."""
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip must be a positive bound, or None, got {clip}")
    levels, noise = host_levels(sigmas, final_zero=False), noise or torch_noise
    renoise = renoising(denoiser, renoise, sigma_min)
    for i in steps(len(levels), progress):
        denoised = evaluate(denoiser, x, levels[i])
        x = denoised = put_back(denoised if clip is None else denoised.clamp(-clip, clip))
        if i + 1 < len(levels):
            alpha, beta = renoise(levels[i + 1])
            drawn = noise_arguments(noise, denoised, i + 1)
            step = consistency_step(denoised, denoised, 1.0, 0.0, alpha=alpha, beta=beta, **drawn)
            assert step.sample is not None
            x = step.sample
        report(callback, i, x, levels[i], denoised)
    return x


def _like(name: str, given: Tensor, x: Tensor, *sizes: Sequence[int]) -> Tensor:
    """What was given, on the device and in the dtype of x, for each of its samples."""
    wanted = [(*x.shape[:2], *size) for size in (sizes or (x.shape[2:],))]
    try:
        return given.to(x).expand(wanted[0])
    except RuntimeError as error:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise ValueError(f"{name} must have or broadcast to the shape {shapes}, got {list(given.shape)}") from error


def _patch_means(t: Tensor, factor: int) -> Tensor:
    """Each element's patch's mean, in the shape of t [N, C, *spatial]."""
    return _enlarged(average_pool(t, factor, ceil_mode=True), factor, t.shape[2:])


def _enlarged(means: Tensor, factor: int, spatial: Sequence[int]) -> Tensor:
    for i, size in enumerate(spatial, 2):
        means = means.repeat_interleave(factor, i).narrow(i, 0, size)
    return means
