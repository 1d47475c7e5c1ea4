"""The drop-in: one verb that makes a model faster and leaves its interface as it is."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .model import ConsistencyModel
from .unet import UNet


def accelerate(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    tune: bool = False,
    cache: str | Path | None = None,
    keep_weights: bool = True,
) -> nn.Module:
    """Return the model with its network evaluated by fused kernels on the CPU; the same interface, for inference.

    The network is captured as a graph, which passes make faster: group norms, SiLUs, residuals, resampling and
    concatenations are done inside the convolutions that they surround, weights are packed once, all values share one
    block of memory. What the passes do not recognise is left to torch; `cmfast profile --explain` says what that is.

    What changes in the result is noticed at its next call, which then captures it anew: weights that were written to,
    loaded or replaced, modules that were added, replaced or removed, attributes that were set. Of a large tensor that
    is written to through `.data` or numpy, which torch does not count, a change of single elements can be missed.

    Args:
        model: a ConsistencyModel, or any network with parameters on the CPU: any arguments of its forward that are
            tensors, None, numbers, strings, and tuples, lists, dicts and dataclasses of them. It is left as it was, its
            training mode too, and shares its parameters and submodules with the result.
        dtype: of the operands of products: float32, or bfloat16 for about half the time at about bfloat16's accuracy;
            sums and all values between layers are float32. None means bfloat16 for a network of bfloat16 parameters and
            float32 for others.
        tune: measure on this machine which form of each convolution is fastest, instead of taking the rule's.
        cache: a folder for packed weights and what was measured; what it holds of these weights is read, not made.
        keep_weights: False frees the model's own weights one by one as they are packed, which takes less memory: the
            model that was given is then of no use, and the result cannot be saved, copied or given other weights.

    Returns:
        A model of the same type, with the same attributes, parameters and keys of its state_dict, in evaluation mode.
        Its calls raise RuntimeError in training mode, for inputs that require gradients, and where submodules have
        hooks. Copies and pickles of it are plain models.

    Raises:
        ValueError: a dtype that is neither float32 nor bfloat16, parameters that are not on the CPU, or float64 ones.
        ImportError: the CPU kernels were not built; the message says how.
        CaptureError: the network's course depends on the values of tensors (at the first call, for networks whose
            shapes of inputs are not known before).
    """
    from .engine.accelerator import plain, products_of, twin

    if isinstance(model, ConsistencyModel):
        fast = twin(model)
        options = {"tune": tune, "cache": cache, "keep_weights": keep_weights}
        network = accelerate(model.unet, dtype, **options)  # type: ignore[arg-type]
        fast.__dict__["_modules"] = {**model._modules, "unet": network}
        fast.training = False
        _warm_up(network, model.sample_shape, model.num_classes)
        return fast
    fast = plain(model)
    fast.training = False
    _install(fast, products_of(list(model.parameters()), dtype), tune, cache, keep_weights)
    if isinstance(model, UNet):
        _warm_up(fast, model.config.sample_shape, model.config.num_classes)
    return fast


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place: the model, or the network of a ConsistencyModel, is evaluated as before; return it.

    Raises:
        ValueError: the model is not an accelerated one.
    """
    from .engine.accelerator import accelerator_of

    network = model.unet if isinstance(model, ConsistencyModel) else model
    assert isinstance(network, nn.Module)
    if accelerator_of(network) is None:
        raise ValueError(
            f"restore: expected a model that cmfast.accelerate returned, got a plain {type(model).__name__}"
        )
    network._compiled_call_impl = None
    return model


def _install(
    network: nn.Module, products: torch.dtype, tune: bool, cache: str | Path | None, keep_weights: bool
) -> None:
    from .engine import Accelerator
    from .engine.accelerator import install

    install(network, Accelerator(network, products, tune=tune, cache=cache, keep_weights=keep_weights))


def _warm_up(network: nn.Module, sample_shape: Sequence[int], num_classes: int | None) -> None:
    """Make what evaluates one sample, so that the first call does not wait for it."""
    from .engine.accelerator import accelerator_of

    inputs = [torch.zeros(1, *sample_shape), torch.zeros(1)]
    if num_classes is not None:
        inputs.append(torch.zeros(1, dtype=torch.int64))
    accelerator = accelerator_of(network)
    assert accelerator is not None
    accelerator.executable(inputs)
