"""A convolution by torch's libraries, with what surrounds it in launches of its own.

    u = the activated and resampled input    one launch of kernels/triton/conv_input.py; upsampling is a copy by torch
    y = conv(u, weight)                      cuDNN; of one tap, a matrix product of cuBLAS
    y + bias + residual, ReLU                a call of torch's each
    moments                                  one launch of kernels/triton/moments_kernels.py

It is what torch launches for a network in channels last, but for the norms. Values between the launches are rounded to
the dtype of images, as torch's are. Each call of torch's is one launch, but for a convolution's own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.conv_arguments import ConvArguments, resample_factors, resampled_sizes
from ...kernels.layout import channels_last
from .. import by_torch
from ..lower import copy_step
from ..steps import Step, Steps
from .launches import launched, planner

_aten = torch.ops.aten

#: Why torch runs these steps.
REASON = "torch's convolution is the faster"


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [Cout, Cin, *kernel] as cuDNN reads them: in the dtype of products, channels last."""
    return channels_last(weight.to(dtype))


def lower_conv2d(steps: Steps, name: str, a: ConvArguments, weight: Tensor, arch: str) -> tuple[Tensor, Tensor | None]:
    """Add the steps of a conv2d call, with weights that `pack` returned; its output and moments."""
    u = _input(steps, name, a, arch)
    shape = a.output_shape()
    bias: Tensor | None = a.bias
    y = steps.image(shape, a.dtype)
    if math.prod(weight.shape[2:]) == 1 and set(a.stride) == {1} and not any(a.padding):
        rows, columns, to = _matrix(u), weight.reshape(weight.shape[:2]).t(), _matrix(y)
        if bias is not None and not bias.is_meta and a.h.dtype == a.dtype:
            given = {"self": bias.to(a.dtype), "mat1": rows, "mat2": columns}
            _call(steps, name, _aten.addmm.default, to, given)
            bias = None
        else:
            _call(steps, name, _aten.mm.default, to, {"self": rows, "mat2": columns})
    else:
        steps.add(Step(name, "aten.convolution", _convolve, (y, u, weight, a.stride, _before(a.padding)), REASON))
    out = _added(steps, name, a, y, bias)
    if a.relu:
        _call(steps, name, _aten.relu.default, out, {"self": out})
    moments = None
    if a.moments:
        moments = launched(steps, name, "channel_moments", planner("channel_moments")(out, arch=arch))
    return out, moments


def _input(steps: Steps, name: str, a: ConvArguments, arch: str) -> Tensor:
    """What is convolved: dense, in the dtype of products, with its zeros where cuDNN cannot add them."""
    u = a.h
    if a.gate or a.skip is not None or a.gain is not None or a.silu or a.resample == "average":
        u = _written(steps, name, a)
    if a.resample == "nearest":
        large = steps.image((*u.shape[:2], *resampled_sizes(u.shape[2:], "nearest")), a.dtype)
        copy_step(steps, name, *_doubled(large, u), REASON)
        u = large
    if any(before != after for before, after in zip(a.padding[::2], a.padding[1::2], strict=True)):
        u = _padded(steps, name, a, u)
    if u.dtype != a.dtype or not u.movedim(1, -1).is_contiguous():
        dense = steps.image(u.shape, a.dtype)
        copy_step(steps, name, dense, u, REASON)
        u = dense
    return u


def _written(steps: Steps, name: str, a: ConvArguments) -> Tensor:
    """What `conv_input` writes of a call's input."""
    from ...kernels.triton.conv import plan_input

    launch, u = plan_input(a)
    launched(steps, name, f"conv2d ({launch.kernel.__name__})", ([launch], u))
    return u


def _padded(steps: Steps, name: str, a: ConvArguments, u: Tensor) -> Tensor:
    sizes = [s + sum(a.padding[2 * i : 2 * i + 2]) for i, s in enumerate(u.shape[2:])]
    padded = steps.image((*u.shape[:2], *sizes), a.dtype)
    steps.add(Step(name, "aten.zero", _zero, (padded,), REASON))
    inside = padded
    for i, size in enumerate(u.shape[2:]):
        inside = inside.narrow(i + 2, a.padding[2 * i], size)
    copy_step(steps, name, inside, u, REASON)
    return padded


def _zero(image: Tensor) -> None:
    image.zero_()


def _before(padding: Sequence[int]) -> list[int]:
    """The zeros on both sides of each dimension; none, where they differ and are in the input."""
    before, after = list(padding[::2]), list(padding[1::2])
    return before if before == after else [0] * len(before)


def _added(steps: Steps, name: str, a: ConvArguments, y: Tensor, bias: Tensor | None) -> Tensor:
    """The output: y with what is added to it, in the dtype of images."""
    terms = [] if bias is None else [bias.reshape(-1, *(1,) * (y.ndim - 2))]
    if a.residual_resample == "average":
        plain = a._replace(skip=None, gain=None, offset=None, silu=False, gate=None)
        terms.append(_written(steps, name, plain._replace(h=a.residual, resample="average", dtype=a.h.dtype)))
    elif a.residual is not None:
        terms.append(a.residual)
    out = y if y.dtype == a.h.dtype else steps.image(y.shape, a.h.dtype)
    if out is not y and not terms:
        copy_step(steps, name, out, y, REASON)
    for term in terms:
        to, what = out, y
        if term is a.residual and a.residual_resample == "nearest":
            what, _ = _doubled(y, term)
            to, term = _doubled(out, term)
        _call(steps, name, _aten.add.Tensor, to, {"self": what, "other": term})
        y = out
    return out


def _doubled(large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an image and of one of half its resolution that are alike but for sizes of 1, which are spread."""
    for i, factor in reversed(list(enumerate(resample_factors(small.ndim - 2)))):
        if factor == 2:
            large, small = large.unflatten(i + 2, (-1, 2)), small.unsqueeze(i + 3)
    return large, small


def _matrix(image: Tensor) -> Tensor:
    """A dense image as [N · P, C]."""
    return image.movedim(1, -1).view(-1, image.shape[1])


def _call(steps: Steps, name: str, target: torch._ops.OpOverload, out: Tensor, given: dict) -> None:
    """A step of an operator of torch's that writes its result where it is told to."""
    operator = str(target).split(".")[1]
    steps.add(Step(name, f"aten.{operator}", by_torch.Computed.of(target), ([out], given), REASON))


def _convolve(y: Tensor, u: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
    """Convolve u; all are dense and channels last."""
    ones = [1] * len(stride)
    if not u.is_cuda or torch.version.hip is not None or not torch.backends.cudnn.enabled:
        y.copy_(_aten.convolution(u, weight, None, stride, padding, ones, False, [0] * len(stride), 1))
        return
    if u.ndim == 3:  # cuDNN has images and video
        y, u, weight = (t.unsqueeze(2) for t in (y, u, weight))
        stride, padding, ones = [1, *stride], [0, *padding], [1, 1]
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    # In float32 the products are float32's, as everywhere: never of tf32.
    _aten.cudnn_convolution.out(u, weight, padding, stride, ones, 1, benchmark, deterministic, False, out=y)
