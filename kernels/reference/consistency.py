"""The definition of `cmfast.kernels.consistency_step` and of its derivative."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import accumulation_dtype, to_order
from .philox import gaussian


def consistency_step(
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
    wants_sample: bool,
    wants_input: bool,
) -> list[Tensor]:
    """Return [denoised], with sample and model_input after it where they are wanted.

    The coefficients (a, b, alpha, beta, input_scale) are vectors [N] where given, and scalars elsewhere. A seed and a
    first_sample that are tensors have one int64 element each, on the device of x.
    """
    a, b, alpha, beta, input_scale = _coefficients(vectors, scalars, x)
    denoised = _denoised(x, model_output, a, b)
    if low is not None:
        denoised = denoised.clamp(low, high)
    outputs = [to_order(denoised, x, x.dtype)]
    if wants_sample:
        sample = alpha * denoised
        if seed is not None:
            noise = gaussian(x.shape, seed, draw, first_sample, x.device)
        if noise is not None:
            sample = sample + beta * noise.to(denoised.dtype)
        outputs.append(to_order(sample, x, x.dtype))
    if wants_input:
        outputs.append(to_order(input_scale * sample, x, model_output.dtype))
    return outputs


def consistency_step_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return the gradients of x and model_output, and of the noise where its dtype is given.

    `grads` are those of denoised, sample and model_input; None stands for zero.
    """
    a, b, alpha, beta, input_scale = _coefficients(vectors, scalars, x)
    zero = x.new_zeros((), dtype=accumulation_dtype(x.dtype))
    ddenoised, dsample, dinput = (zero if g is None else g.to(zero.dtype) for g in grads)
    dsample = dsample + input_scale * dinput
    dresult = (ddenoised + alpha * dsample).expand(x.shape)
    if low is not None and high is not None:
        denoised = _denoised(x, model_output, a, b)
        dresult = torch.where((denoised >= low) & (denoised <= high), dresult, zero)
    outputs = [to_order(a * dresult, x, x.dtype), to_order(b * dresult, x, model_output.dtype)]
    if noise_dtype is not None:
        outputs.append(to_order((beta * dsample).expand(x.shape), x, noise_dtype))
    return outputs


def _coefficients(vectors: Sequence[Tensor | None], scalars: Sequence[float], x: Tensor) -> list[Tensor | float]:
    """Each coefficient as a float, or as [N, 1, …] to broadcast against x."""
    wide, shape = accumulation_dtype(x.dtype), (-1, *(1,) * (x.ndim - 1))
    return [s if v is None else v.to(wide).reshape(shape) for v, s in zip(vectors, scalars, strict=True)]


def _denoised(x: Tensor, model_output: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    return a * x.to(wide) + b * model_output.to(wide)
