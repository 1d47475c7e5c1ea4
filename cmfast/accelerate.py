"""The drop-in: one verb that makes a model faster and leaves its interface as it is."""

from pathlib import Path

import torch
from torch import nn

from .model import ConsistencyModel


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

    Args:
        model: a ConsistencyModel, or a network with UNet's forward, with parameters on the CPU. It is not changed, and
            shares its parameters with the result.
        dtype: of the operands of products: float32, or bfloat16 for about half the time at about bfloat16's accuracy;
            sums and all values between layers are float32. None means bfloat16 for a network of bfloat16 parameters and
            float32 for others.
        tune: measure on this machine which form of each convolution is fastest, instead of taking the rule's.
        cache: a folder for packed weights and what was measured; what it holds of these weights is read, not made.
        keep_weights: False frees the model's own weights one by one as they are packed, which takes less memory: the
            model that was given is then of no use, and the result cannot be saved, copied or given other weights.

    Returns:
        A ConsistencyModel, or an `engine.AcceleratedUNet`. Its network raises RuntimeError in training mode and for
        inputs that require gradients.

    Raises:
        ValueError: a dtype that is neither float32 nor bfloat16, parameters that are not on the CPU, or float64 ones.
        ImportError: the CPU kernels were not built; the message says how.
        CaptureError: the network's course depends on the values of tensors.
    """
    from .engine import AcceleratedUNet

    network = model.unet if isinstance(model, ConsistencyModel) else model
    if isinstance(network, AcceleratedUNet):
        network = network.accelerated
    fast = AcceleratedUNet(network, _products(network, dtype), tune=tune, cache=cache, keep_weights=keep_weights)
    if isinstance(model, ConsistencyModel):
        fast.warm_up(model.sample_shape, model.num_classes)
        return ConsistencyModel(
            fast,
            model.preconditioning,
            sample_shape=model.sample_shape,
            num_classes=model.num_classes,
            recommended_levels=model.recommended_levels,
        ).eval()
    if hasattr(fast.config, "sample_shape"):
        fast.warm_up(fast.config.sample_shape, fast.config.num_classes)
    return fast


def _products(network: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"accelerate: dtype must be float32 or bfloat16, got {dtype}")
    parameters = list(network.parameters())
    for p in parameters:
        if p.device.type != "cpu":
            raise ValueError(f"accelerate: expected parameters on the CPU, got some on {p.device}")
        if p.dtype == torch.float64:
            raise ValueError("accelerate: float64 networks are not accelerated: convert with .float()")
    own = torch.bfloat16 if parameters and parameters[0].dtype == torch.bfloat16 else torch.float32
    return dtype or own
