"""The definition of `cmfast.kernels.group_norm` and of its derivative."""

import math

import torch
from torch import Tensor

from ..layout import accumulation_dtype, to_order


def group_norm(
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [N, C, *spatial], and the mean and 1/√(variance + eps) of each group [N, num_groups]."""
    u = _input(h, skip, add)
    n, c, size = u.shape[0], u.shape[1], math.prod(u.shape[2:])
    if not u.numel():  # of which newer versions of torch make an error
        mean = u.new_zeros((n, num_groups))
        return to_order(u, h), mean, torch.full_like(mean, eps).rsqrt()
    normalised, mean, rstd = torch.native_group_norm(u, None, None, n, c, size, num_groups, eps)
    y = _affine(normalised, weight, bias, scale, shift)
    return to_order(torch.nn.functional.silu(y) if silu else y, h), mean, rstd


def group_norm_backward(
    grad: Tensor,
    h: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [N, C, *spatial], Σ dz and Σ dz·û [N, C], z the value before the activation, û the normalised input."""
    u = _input(h, skip, add)
    per_group = u.shape[1] // num_groups
    channel_rstd = rstd.repeat_interleave(per_group, dim=1)
    channel_mean = mean.repeat_interleave(per_group, dim=1)
    normalised = (u - _per_channel(channel_mean, u)) * _per_channel(channel_rstd, u)
    dz = grad.to(u.dtype)
    if silu:
        dz = _silu_backward(dz, _affine(normalised, weight, bias, scale, shift))
    dz_sum = dz.flatten(2).sum(2) if u.ndim > 2 else dz.clone()
    dzu_sum = (dz * normalised).flatten(2).sum(2) if u.ndim > 2 else dz * normalised
    gain = _gain(normalised, weight, scale)

    # du = rstd · (gain·dz - mean(gain·dz) - û · mean(gain·dz·û)), the means over each group
    def group_mean(sums: Tensor) -> Tensor:
        count = per_group * math.prod(u.shape[2:])
        return ((gain * sums).reshape(-1, num_groups, per_group).sum(2) / count).repeat_interleave(per_group, dim=1)

    centred = torch.addcmul(
        _per_channel(-channel_rstd * group_mean(dz_sum), u),
        normalised,
        _per_channel(-channel_rstd * group_mean(dzu_sum), u),
    )
    dx = torch.addcmul(centred, dz, _per_channel(channel_rstd * gain, u))
    return to_order(dx, h), dz_sum, dzu_sum


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    """The gradient of silu at z. torch's kernel of it has no derivative, and serves where none can be asked for."""
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)
    sigmoid = torch.sigmoid(z)
    return grad * (sigmoid * (1 + z * (1 - sigmoid)))


def _input(h: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
    """The input of the normalisation, contiguous, in the accumulation dtype."""
    u = h if skip is None else torch.cat((h, skip), dim=1)
    u = u.to(accumulation_dtype(h.dtype)).contiguous()
    return u if add is None else u + _per_channel(add.to(u.dtype), u)


def _affine(
    normalised: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """(normalised · weight + bias) · (1 + scale) + shift, as one multiply-add a channel."""
    gain = _gain(normalised, weight, scale)
    offset = torch.zeros_like(gain)
    if bias is not None:
        offset = offset + (bias if scale is None else bias * (1 + scale.to(gain.dtype)))
    if shift is not None:
        offset = offset + shift
    return torch.addcmul(_per_channel(offset, normalised), normalised, _per_channel(gain, normalised))


def _gain(normalised: Tensor, weight: Tensor | None, scale: Tensor | None) -> Tensor:
    """What multiplies the normalised input: weight · (1 + scale) [N, C]."""
    gain = normalised.new_ones(normalised.shape[:2])
    if weight is not None:
        gain = gain * weight
    return gain if scale is None else gain * (1 + scale.to(gain.dtype))


def _per_channel(value: Tensor, u: Tensor) -> Tensor:
    """[N, C] as [N, C, 1, …], to broadcast against u."""
    return value.reshape(*value.shape, *(1,) * (u.ndim - 2))
