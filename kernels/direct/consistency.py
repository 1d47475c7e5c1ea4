"""The consistency step without torch's dispatcher."""

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import backends, remembered
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """`cmfast.kernels.consistency_step`; on the processor of float32 coefficients, and integers where those may be."""
    coefficients = (a, b, 1.0 if alpha is None else alpha, beta, input_scale)
    backend = backend or backends.override()
    if backend is not None or not x.is_cpu:
        wanted = (alpha is not None or beta is not None, input_scale is not None)
        return _recalled(x, model_output, coefficients, low, high, noise, seed, draw, first_sample, *wanted, backend)
    vectors: list[Any] = [c for c in coefficients if type(c) not in _NUMBERS]
    if not x.numel() or not plain.is_plain((x, model_output, noise, *vectors)):
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


def _recalled(
    x: Tensor,
    model_output: Tensor,
    coefficients: Sequence[float | Tensor | None],
    low: float | None,
    high: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
    sample: bool,
    model_input: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The step by launches that are remembered; None where the call has to take the long way."""
    vectors: list[Any] = []
    scalars = []
    for c in coefficients:
        number = float(c) if isinstance(c, float | int) else None
        vectors.append(c if number is None else None)
        scalars.append(number or 0.0)
    tensors: list[Any] = [t for t in (noise, seed, first_sample, *vectors) if t is not None and type(t) is not int]
    if not plain.is_plain((x, model_output, *tensors)) or (tensors and any([t.requires_grad for t in tensors])):
        return None
    if (noise is not None or seed is not None) != (coefficients[3] is not None):  # the long way refuses it
        return None
    # The sizes are those of a call that was made; the numbers are others.
    if type(seed) is int:
        if not 0 <= seed < 1 << 64:
            return None
        seed = seed if seed < 1 << 63 else seed - (1 << 64)
    if type(draw) is not int or not 0 <= draw < 1 << 32:
        return None
    if type(first_sample) is int and not 0 <= first_sample <= (1 << 32) - x.shape[0]:
        return None
    kind = kind_of_step(x, model_output, vectors, low, noise, seed, first_sample, sample, model_input)
    numbers = numbers_of_step(scalars, low, high, seed, draw, first_sample)
    found = remembered.recall("consistency_step", backend, kind, numbers)
    return None if found is None else (*found, None, None)[:3]


def kind_of_step(
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    low: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int | Tensor,
    sample: bool,
    model_input: bool,
) -> tuple[Any, ...]:
    """What of a call of the operator tells which launches are made: its tensors, and what else is given."""
    seed, first_sample = 0 if type(seed) is int else seed, 0 if type(first_sample) is int else first_sample
    return x, model_output, noise, *vectors, low is not None, seed, first_sample, sample, model_input


def numbers_of_step(
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
) -> tuple[float, ...]:
    """What of it the launches are given, other numbers in each call; 0 in the place of what is no number."""
    bounds = (0.0, 0.0) if low is None or high is None else (low, high)
    integers = (seed if type(seed) is int else 0, draw, first_sample if type(first_sample) is int else 0)
    return *scalars, *bounds, *integers
