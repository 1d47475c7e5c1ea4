"""Calls that go to a kernel without a detour.

Between an operator's call and its kernel stand torch's dispatcher, the choice of a backend and the preparation of the
operands: 40 to 210 µs. A call of plain tensors that nothing traces, maps or differentiates needs none of it, where the
processor's kernel takes its tensors as they are, or where the launches of such a call on a GPU are remembered. Each
function here returns None where the call is of another kind, which then takes the way that every call may take.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conv_arguments import ConvArguments
from ..relaunch import NOTHING
from . import plain
from .apply_group_norm import apply_group_norm
from .attention import attention
from .channel_norm import channel_norm
from .consistency import consistency_step, kind_of_step, numbers_of_step
from .conv import conv2d
from .group_norm import group_norm
from .moments import channel_moments, fold_group_norm
from .timestep_embedding import timestep_embedding

__all__ = [
    "apply_group_norm",
    "attention",
    "channel_moments",
    "channel_norm",
    "consistency_step",
    "conv2d",
    "fold_group_norm",
    "group_norm",
    "kind_of_step",
    "numbers_of_step",
    "of_operator",
    "plain",
    "timestep_embedding",
]


def of_operator(name: str, arguments: Sequence) -> Any:
    """What torch.ops.cmfast gives for inference, by the short way: to whom a mode told of the call, and who times it.

    What only a gradient reads, a group norm's statistics and attention's log-sum-exp, is empty.
    """
    *given, backend = arguments
    serve = _OF_OPERATORS.get(name)
    if serve is None or backend is not None or torch.is_grad_enabled():
        return None
    return serve(*given)


def _group_norm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    y = group_norm(*_activated(arguments, 9))
    return None if y is None else (y, NOTHING, NOTHING)


def _attention(*arguments: Any) -> tuple[Tensor, Tensor] | None:
    out = attention(*arguments)
    return None if out is None else (out, NOTHING)


def _conv2d(*arguments: Any) -> tuple[Tensor, Tensor] | None:
    return conv2d(ConvArguments(*arguments))


def _consistency_step(*arguments: Any) -> list[Tensor] | None:
    if len(arguments) != 12:  # tensors of the seed or the first sample follow
        return None
    x, model_output, vectors, scalars, low, high, noise, seed, draw, first_sample, sample, model_input = arguments
    a, b, alpha, beta, scale = (s if v is None else v for v, s in zip(vectors, scalars, strict=True))
    noisy = noise is not None or seed is not None
    coefficients = (a, b, alpha if sample else None, beta if sample and noisy else None, scale if model_input else None)
    outputs = consistency_step(x, model_output, *coefficients, low, high, noise, seed, draw, first_sample)
    return None if outputs is None else [t for t in outputs if t is not None]


def _activated(arguments: Sequence, place: int) -> list[Any]:
    """The arguments with the name of the activation in the place of whether it is SiLU."""
    named = list(arguments)
    named[place] = "silu" if named[place] else None
    return named


_OF_OPERATORS: dict[str, Callable[..., Any]] = {
    "group_norm": _group_norm,
    "attention": _attention,
    "channel_moments": channel_moments,
    "fold_group_norm": fold_group_norm,
    "apply_group_norm": lambda *arguments: apply_group_norm(*_activated(arguments, 11)),
    "channel_norm": lambda *arguments: channel_norm(*_activated(arguments, 8)),
    "conv2d": _conv2d,
    "timestep_embedding": timestep_embedding,
    "consistency_step": _consistency_step,
}
