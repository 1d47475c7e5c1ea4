"""Layer norm or RMS norm over the channels of each position, with FiLM and an activation.

    u = x − mean of x over its channels      layer norm; u = x of an RMS norm
    y = u / √(max(mean of u², least) + eps) · weight + bias
    y = y · (1 + scale) + shift
    y = activation(y)

Ba, Kiros and Hinton 2016, "Layer Normalization", equation 3; Zhang and Sennrich 2019, "Root Mean Square Layer
Normalization", equation 4. Tokens [R, C] are images of no spatial dimension.
"""

import torch
from torch import Tensor

from . import direct, remembered
from .backends import resolve
from .layout import describe, empty_in_order
from .transforms import refuse_gradients

_ACTIVATIONS = (None, "silu")


def channel_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    centred: bool = True,
    least: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise each position over its channels. For inference: there are no gradients.

    Args:
        x: [N, C, *spatial] of any floating dtype, fastest in channels_last; C is not 0.
        weight: [C].
        bias: [C].
        eps: added to the mean square.
        centred: subtract the mean first: a layer norm; else an RMS norm.
        least: the mean square is at least this. Of `torch.nn.functional.normalize(x, dim=1, eps=e) * C ** 0.5` it is
            e² / C, and eps 0.
        scale: [N, C], FiLM's.
        shift: [N, C], FiLM's.
        activation: None or "silu".
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        y like x: its shape, dtype and memory format. All before the last rounding is float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: an input requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    y = direct.channel_norm(x, weight, bias, eps, centred, least, scale, shift, activation, backend)
    if y is not None:
        return y
    if x.ndim < 2 or not x.is_floating_point() or not x.shape[1]:
        raise ValueError(f"channel_norm: x must be a floating-point tensor [N, C, *spatial], got {describe(x)}")
    n, c = x.shape[:2]
    rows = (("weight", weight, (c,)), ("bias", bias, (c,)), ("scale", scale, (n, c)), ("shift", shift, (n, c)))
    for name, t, shape in rows:
        if t is not None and (t.shape != shape or not t.is_floating_point()):
            raise ValueError(f"channel_norm: {name} must be floating point {list(shape)}, got {describe(t)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f'channel_norm: activation must be None or "silu", got {activation!r}')
    if eps < 0 or least < 0:
        raise ValueError(f"channel_norm: eps and least must not be negative, got {eps} and {least}")
    refuse_gradients("channel_norm", "it serves inference", x, weight, bias, scale, shift)
    silu = activation == "silu"
    return torch.ops.cmfast.channel_norm(
        x, weight, bias, float(eps), centred, float(least), scale, shift, silu, backend
    )


torch.library.define(
    "cmfast::channel_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred, float least, Tensor? scale, Tensor? shift, "
    "bool silu, str? backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::channel_norm", "default")
def _channel_norm(*arguments):
    *others, backend = arguments
    tensors = [t for t in others if isinstance(t, Tensor)]
    serve = resolve("channel_norm", tensors, backend)
    return remembered.serve("channel_norm", backend, others, serve, *others)


@torch.library.register_fake("cmfast::channel_norm")
def _channel_norm_fake(x, *rest):
    return empty_in_order(x, x.shape)
