"""What a network in plain torch would run for an operator's call: what a kernel's time stands beside."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch

from ..kernels import reference
from ..kernels.conv_arguments import ConvArguments
from ..kernels.shapes import Call


def in_torch(call: Call, given: tuple[Any, ...], compiled: Callable[..., Any] | None = None) -> Callable[[], Any]:
    """What a network in plain torch would run, gradients by autograd; `compiled` is what `compile_call` made of it."""
    forward, inputs, grads = _in_torch(call, given)
    forward = compiled or forward
    if grads is None:
        return lambda: forward(*inputs)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    wanted = [x for x in leaves if isinstance(x, Tensor)]
    with torch.enable_grad():
        outputs = forward(*leaves)
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def compile_call(call: Call, given: tuple[Any, ...]) -> Callable[..., Any]:
    """What torch.compile makes of the call in plain torch, for any values of these shapes."""
    functorch.donated_buffer = False  # a backward that runs more than once keeps its buffers
    return torch.compile(_in_torch(call, given)[0], dynamic=False)


def _in_torch(call: Call, given: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """A function of torch's operators, its arguments, and the gradients of its outputs for a backward.

    A plain network's convolution gives no moments. Nor does such a network fold a norm: that is the definition itself.
    """
    if call.op == "conv2d":
        return _convolution(*given)
    if call.op == "channel_moments":
        return _moments, given, None
    if call.op == "timestep_embedding":
        return lambda t, frequencies: reference.timestep_embedding(t, frequencies, *given[2:]), given[:2], None
    if call.op == "channel_norm":
        return _channel_norm, given, None
    if call.op == "fold_group_norm":
        return lambda first, second: reference.fold_group_norm(first, second, *given[2:]), given[:2], None
    if call.op == "apply_group_norm":
        h, skip, _, _, groups, weight, bias, eps, add, scale, shift, silu, resample = given
        return _norm(groups, eps, silu, resample), (h, skip, weight, bias, add, scale, shift), None
    if call.op.startswith("attention"):
        grad = given[0] if call.op.endswith("backward") else None
        q, k, v = given[1:4] if grad is not None else given[:3]
        factor = given[-1]
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=factor), (q, k, v), grad
    if call.op == "group_norm_backward":
        grad, h, skip, groups, weight, bias, add, scale, shift, silu, *_ = given
        return _norm(groups, 1e-5, silu), (h, skip, weight, bias, add, scale, shift), grad
    if call.op == "group_norm":
        h, skip, groups, weight, bias, eps, add, scale, shift, silu = given
        return _norm(groups, eps, silu), (h, skip, weight, bias, add, scale, shift), None
    if call.op == "consistency_step_backward":
        grads, x, output, _, scalars, low, high, _ = given
        return _step(scalars, low, high, True, False, None), (x, output), [g for g in grads if g is not None]
    x, output, _, scalars, low, high, _, seed, _, _, sample, model_input = given
    noise = torch.randn_like if seed is not None else None
    return _step(scalars, low, high, sample, model_input, noise), (x, output), None


def _convolution(a: ConvArguments) -> tuple[Callable[..., Any], tuple[Any, ...], None]:
    """The convolution by cuDNN with what surrounds it, all in the image's dtype and channels last."""

    def rows(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(a.h.dtype)[..., None, None]

    def convolution(
        h: Tensor, skip: Any, weight: Tensor, bias: Tensor, gain: Any, offset: Any, residual: Any
    ) -> Tensor:
        u = h if skip is None else torch.cat((h, skip), 1)
        u = u if gain is None else torch.addcmul(offset, u, gain)
        u = F.silu(u) if a.silu else u
        y = F.conv2d(_resampled(u, a.resample), weight, bias, a.stride, a.padding[::2])
        return y if residual is None else y + residual

    weight = a.weight.to(memory_format=torch.channels_last)
    inputs = (a.h, a.skip, weight, a.bias.to(a.h.dtype), rows(a.gain), rows(a.offset), a.residual)
    return convolution, inputs, None


def _resampled(x: Tensor, resample: str | None) -> Tensor:
    if resample == "nearest":
        return F.interpolate(x, scale_factor=2.0)
    return F.avg_pool2d(x, 2) if resample == "average" else x


def _moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x.flatten(2), 2, correction=0)
    return torch.stack((mean, variance * x[0, 0].numel()), 1)


def _norm(groups: int, eps: float, silu: bool, resample: str | None = None) -> Callable[..., Any]:
    def norm(h: Tensor, skip: Any, weight: Tensor, bias: Tensor, add: Any, scale: Any, shift: Any) -> Tensor:
        x = h if skip is None else torch.cat((h, skip), 1)

        def rows(value: Tensor) -> Tensor:
            return value.reshape(*value.shape, *(1,) * (x.ndim - 2))

        x = x if add is None else x + rows(add)
        y = F.group_norm(x, groups, weight, bias, eps)
        y = y if scale is None else y * (1 + rows(scale)) + rows(shift)
        return _resampled(F.silu(y) if silu else y, resample)

    return norm


def _channel_norm(
    x: Tensor, weight: Any, bias: Any, eps: float, centred: bool, least: float, scale: Any, shift: Any, silu: bool
) -> Tensor:
    tokens = x.movedim(1, -1)
    norm = functools.partial(F.layer_norm, bias=bias) if centred else F.rms_norm
    y = norm(tokens, tokens.shape[-1:], weight=weight, eps=eps)
    y = y if centred or bias is None else y + bias

    def rows(value: Tensor) -> Tensor:
        return value.reshape(len(value), *(1,) * (x.ndim - 2), -1)

    y = y if scale is None else y * (1 + rows(scale)) + rows(shift)
    return (F.silu(y) if silu else y).movedim(-1, 1)


def _step(
    scalars: Any, low: float, high: float, wants_sample: bool, wants_input: bool, noise: Callable[..., Tensor] | None
) -> Callable[..., Any]:
    a, b, alpha, beta, input_scale = scalars

    def step(x: Tensor, output: Tensor) -> Any:
        denoised = (a * x + b * output).clamp(low, high)
        if not wants_sample:
            return denoised
        sample = alpha * denoised if noise is None else alpha * denoised + beta * noise(x)
        return (denoised, sample, input_scale * sample) if wants_input else (denoised, sample)

    return step
