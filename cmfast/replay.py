"""Sampling as one replay: which batches of samples are made by replaying a CUDA graph, and which step by step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import trace
from .engine.accelerator import accelerator_of, turns
from .engine.capture import CaptureError
from .kernels.backends import chosen
from .model import ConsistencyModel
from .noise import GaussianNoise


def replayed(
    model: ConsistencyModel,
    function: Callable[..., Tensor],
    levels: Sequence[float],
    size: int,
    noise: GaussianNoise,
    labels: Tensor | None,
    clip: Any,
    **options: Any,
) -> Tensor | None:
    """What `model._sample_batch` returns for the same arguments, by one replay; None where it has to run itself.

    The first batch of a kind is made step by step, then captured; the seed, the first sample and the labels may be
    others at each replay. The network is looked at before each: where it has changed, it is captured anew.

    Not replayed are models on the CPU, or with graphs=False; networks that cannot be
    captured as a whole, or have hooks; models with methods of their own; batches with a callback, a progress bar or
    options that are not numbers or strings; and what is noted by `engine.trace`, or captured by the caller.
    """
    if options.pop("callback", None) is not None or options.pop("progress", False):
        return None
    numbers = (tuple(levels), size, clip, tuple(sorted(options.items())))
    if not _is_plain(numbers) or not _is_in_range(noise, size) or not _is_as_written(model):
        return None
    executable, replays = _ready(model, size, labels)
    if replays is None:
        return None

    def make(seed: Tensor, first_sample: Tensor, labels: Tensor | None = None) -> Tensor:
        return model._sample_batch(function, levels, size, GaussianNoise(seed, first_sample), labels, clip, **options)

    key = (function, *numbers, labels is None, model.preconditioning, model.sample_shape, model.dtype, chosen())
    seed = noise.seed - (1 << 64) if noise.seed >= 1 << 63 else noise.seed  # as an int64
    inputs = [seed, noise.first_sample] if labels is None else [seed, noise.first_sample, labels]
    with turns.beside():  # before the lock of captures, as a thread that is alone takes it
        return replays(key, executable, make, inputs)


def _ready(model: ConsistencyModel, size: int, labels: Tensor | None) -> tuple[Any, Any]:
    """What evaluates the network as it is now, and the replays of it; (None, None) where there are none."""
    network = model.unet
    accelerator = accelerator_of(network)
    if accelerator is None or accelerator.target.replays is None or trace.is_on():
        return None, None
    if network._forward_hooks or network._forward_pre_hooks:
        return None, None
    device = accelerator.target.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None, None
    # What the network is called with, without values.
    x = torch.empty((size, *model.sample_shape), dtype=model.dtype, device=device)
    try:
        executable = accelerator.executable((x, x.new_empty(size, dtype=model.state_dtype), labels))
    except CaptureError:  # its own forward runs, or says what is wrong
        return None, None
    return executable, accelerator.target.replays


def _is_plain(value: Any) -> bool:
    """Whether a value is what it says, now and later."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _is_in_range(noise: GaussianNoise, size: int) -> bool:
    """Whether the noise is one that integers on the device can stand for; other ones are refused when it is drawn."""
    seed, first_sample = noise.seed, noise.first_sample
    if not isinstance(seed, int) or not isinstance(first_sample, int):
        return False
    return 0 <= seed < 1 << 64 and 0 <= first_sample <= (1 << 32) - size


def _is_as_written(model: ConsistencyModel) -> bool:
    """Whether a model computes by ConsistencyModel's methods, and a preconditioning that cannot change."""
    own = vars(ConsistencyModel)
    if type(model) is not ConsistencyModel or any(name in own for name in vars(model)):
        return False
    preconditioning = model.preconditioning
    parameters = vars(type(preconditioning)).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return False
    return _is_plain(tuple(getattr(preconditioning, field.name) for field in dataclasses.fields(preconditioning)))
