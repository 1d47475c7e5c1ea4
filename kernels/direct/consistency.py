"""The consistency step without torch's dispatcher."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..layout import empty_in_order
from . import plain

_NUMBERS = (float, int, NoneType)


def consistency_step(
    x: Tensor,
    model_output: Tensor,
    a: float | Tensor,
    b: float | Tensor,
    alpha: float | Tensor | None,
    beta: float | Tensor | None,
    input_scale: float | Tensor | None,
    low: float | None,
    high: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """`cmfast.kernels.consistency_step` where coefficients are numbers or float32, and seed and index are integers."""
    coefficients = (a, b, 1.0 if alpha is None else alpha, beta, input_scale)
    vectors: list[Any] = [c for c in coefficients if type(c) not in _NUMBERS]
    if backends.override() is not None or not x.is_cpu or not x.numel():
        return None
    if not plain.is_plain((x, model_output, noise, *vectors)):
        return None
    if type(seed) not in _NUMBERS or type(first_sample) is not int or any([v.requires_grad for v in vectors]):
        return None
    denoised = empty_in_order(x, x.shape)
    sample = None if alpha is None and beta is None else torch.empty_like(denoised)
    model_input = None if input_scale is None else torch.empty_like(denoised, dtype=model_output.dtype)
    outputs = (denoised, sample, model_input)
    tensors = (x, model_output, noise, *outputs)
    done = plain.ran("consistency_step_of", *tensors, *coefficients, low, high, seed, draw, first_sample)
    return outputs if done else None
