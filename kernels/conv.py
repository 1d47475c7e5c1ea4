"""Convolution with prepared weights, and with what surrounds it in a diffusion U-Net done as its input is read.

    u = x · gain + offset                      a group norm folded to one multiply-add a channel: gain, offset [N, C]
    u = u · sigmoid(u)                         silu
    u = nearest upsampling or average pooling  resample
    y = conv(u, weight) + bias + residual          the residual resampled as well

x is [N, C, H, W], or a pair (h, skip) that stands for their concatenation along C. The weights are prepared once: of
3 × 3 kernels of stride 1, for Winograd's minimal filtering (Lavin and Gray 2016, "Fast Algorithms for Convolutional
Neural Networks") of 2 × 2 or 4 × 4 outputs a tile, with 2.25 or 4 times fewer products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import BackendError, available, chosen, resolve
from .group_norm import concatenated_shape
from .layout import describe, image_format
from .transforms import refuse_gradients

_RESAMPLE = (None, "nearest", "average")
_DIRECT = ((1, False),)

#: The forms (tile, transformed) that `prepare_conv` has for 3 x 3 kernels of stride 1, by the dtype of the products. An
#: engine that measures may take any in float32; F(4 × 4) in bfloat16 where its error is allowed.
CONV_FORMS = {
    torch.float32: (*_DIRECT, (2, True), (2, False), (4, True), (4, False)),
    torch.bfloat16: (*_DIRECT, (2, True), (4, True)),
}


class PreparedConv(NamedTuple):
    """The weights of a convolution as `conv2d` takes them; tensors and numbers, so that it can be saved and loaded."""

    weight: Tensor  # [Cout, Cin, k, k], as it was given
    bias: Tensor | None  # [Cout]
    packed: Tensor | None  # as the CPU kernels read it, on any of their instruction sets; None without them
    tile: int  # outputs a side of a Winograd tile; 1 for the direct form
    transformed: bool  # whether Winograd's weights are packed so; else the 3 x 3 kernels, transformed at every use
    stride: int
    padding: int
    dtype: torch.dtype  # of the products; sums are float32


class ConvOutput(NamedTuple):
    """What `conv2d` returns; moments are None where they were not asked for."""

    out: Tensor  # [N, Cout, H, W]
    moments: Tensor | None  # [N, 2, Cout], float32


def prepare_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    height: int,
    width: int,
    tile: int | None = None,
    transformed: bool | None = None,
) -> PreparedConv:
    """Prepare the weights of a convolution for `conv2d`.

    Args:
        weight: [Cout, Cin, k, k], any floating dtype.
        bias: [Cout].
        stride: of both dimensions.
        padding: zeros on each of the four sides.
        dtype: float32, or bfloat16 to round both operands of the products; sums are float32.
        height: rows of the input, after it is resampled.
        width: columns. The form is chosen for this size, and serves any.
        tile: 4 or 2 for Winograd's form with so many outputs a side, 1 for the direct form; None chooses. With
            bfloat16 a tile of 4 costs three times the error of the others: it is taken only where it is asked for.
        transformed: whether Winograd's weights are packed transformed, 4 or 16 / 9 times larger, or as they are, to be
            transformed at every use, in float32 alone; None chooses.

    Raises:
        ValueError: shapes, dtypes or a form that do not fit.
    """
    if weight.ndim != 4 or not weight.is_floating_point() or weight.shape[2] != weight.shape[3] or not weight.numel():
        raise ValueError(
            f"prepare_conv: weight must be a floating-point tensor [Cout, Cin, k, k], got {describe(weight)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"prepare_conv: bias must be floating point of shape [{len(weight)}], got {describe(bias)}")
    if stride < 1 or padding < 0 or height < 1 or width < 1:
        raise ValueError(
            "prepare_conv: stride, height and width must be positive and padding not negative, "
            f"got {stride}, {height}, {width} and {padding}"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"prepare_conv: dtype must be float32 or bfloat16, got {dtype}")
    kernel = weight.shape[2]
    forms = CONV_FORMS[dtype] if kernel == 3 and stride == 1 else _DIRECT
    if tile is None:
        tile = choose_tile((height + 2 * padding - 2) * (width + 2 * padding - 2), dtype) if len(forms) > 1 else 1
    if transformed is None:
        transformed = tile > 1 and (dtype != torch.float32 or not transform_at_use(weight, height * width))
    if (tile, transformed) not in forms:
        raise ValueError(
            f"prepare_conv: {kernel} x {kernel} kernels of stride {stride} in {dtype} have the forms "
            f"(tile, transformed) {', '.join(map(str, forms))}: got {(tile, transformed)}"
        )
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    packed = None
    if available("cpu", "conv2d", (weight,))[0]:
        from .cpu.conv import pack

        packed = pack(weight, tile, transformed, dtype)
    return PreparedConv(weight, bias, packed, tile, transformed, stride, padding, dtype)


def choose_tile(outputs: int, dtype: torch.dtype) -> int:
    """The tile for so many outputs of a channel: below 4 of the larger tiles, the smaller ones leave less unused."""
    return 4 if dtype == torch.float32 and outputs > 16 else 2


def transform_at_use(weight: Tensor, positions: int) -> bool:
    """Whether so few outputs use so large weights that reading them transformed takes longer than transforming them.

    At 16 x 16 it takes a few percent longer to transform them; there it is done for the memory, a quarter of the whole.
    """
    return positions <= 256 and weight.numel() > 9 * 256 * 256


def conv2d(
    x: Tensor | tuple[Tensor, Tensor],
    prepared: PreparedConv,
    *,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    silu: bool = False,
    resample: str | None = None,
    residual: Tensor | None = None,
    residual_resample: str | None = None,
    moments: bool = False,
    backend: str | None = None,
) -> ConvOutput:
    """Convolve x with prepared weights. For inference: there are no gradients.

    Args:
        x: [N, C, H, W] of any floating dtype, fastest in channels_last, or a pair `(h, skip)` of tensors
            [N, C1, H, W] and [N, C2, H, W] read as their concatenation along the channels.
        prepared: what `prepare_conv` returned.
        gain: [N, C], multiplies x; together with offset.
        offset: [N, C], added to it.
        silu: apply SiLU to the input, after gain and offset.
        resample: None, "nearest" for nearest upsampling by 2 of the activated input, or "average" for its 2 x 2 average
            pooling.
        residual: of the shape and dtype of the output, added to it.
        residual_resample: None, "nearest" or "average", as `resample`, of a residual of half or double that resolution.
        moments: also return the output channels' means and sums of squared deviations from them, for the next group
            norm's `fold_group_norm`.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        ConvOutput(out, moments): out in the dtype of x, channels last in memory where the channels of x (of h) are
        adjacent. Products are taken of operands in the dtype of the preparation, all else is float32. Winograd's forms
        err by at most 8 ε Σ |Aᵀ|·((|G||w||Gᵀ|) ⊙ (|Bᵀ||u||B|))·|A|, the sum over the input channels and ε the spacing
        of float32 at 1; in bfloat16, by half of that and once such a sum with the spacing of bfloat16. The roundings
        of what is added and of out come on top. The tests hold them to it.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: an input requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    h, skip = x if isinstance(x, tuple | list) else (x, None)
    _check(h, skip, prepared, gain, offset, resample, residual, residual_resample)
    refuse_gradients("conv2d", "prepared weights serve inference", h, skip, gain, offset, residual)
    out, sums = torch.ops.cmfast.conv2d(
        h,
        skip,
        *prepared,
        resample,
        gain,
        offset,
        silu,
        residual,
        residual_resample,
        moments,
        backend,
    )
    return ConvOutput(out, sums if moments else None)


def _check(
    h: Tensor,
    skip: Tensor | None,
    prepared: PreparedConv,
    gain: Tensor | None,
    offset: Tensor | None,
    resample: str | None,
    residual: Tensor | None,
    residual_resample: str | None,
) -> None:
    if h.ndim != 4 or not h.is_floating_point():
        raise ValueError(f"conv2d: x must be a floating-point tensor [N, C, H, W], got {describe(h)}")
    if skip is not None and (
        skip.ndim != 4 or skip.shape[0] != h.shape[0] or skip.shape[2:] != h.shape[2:] or skip.dtype != h.dtype
    ):
        raise ValueError(
            "conv2d: a pair (h, skip) must agree in everything but the number of channels, "
            f"got {describe(h)} and {describe(skip)}"
        )
    n, c = concatenated_shape(h, skip)[:2]
    if c != prepared.weight.shape[1]:
        raise ValueError(f"conv2d: the weights were prepared for {prepared.weight.shape[1]} channels, got {c}")
    if (gain is None) != (offset is None):
        raise ValueError("conv2d: gain and offset belong together: give both or neither")
    for name, t in (("gain", gain), ("offset", offset)):
        if t is not None and (t.shape != (n, c) or not t.is_floating_point()):
            raise ValueError(f"conv2d: {name} must be a floating-point tensor [{n}, {c}], got {describe(t)}")
    for name, value in (("resample", resample), ("residual_resample", residual_resample)):
        if value not in _RESAMPLE:
            raise ValueError(f'conv2d: {name} must be None, "nearest" or "average", got {value!r}')
    shape = _output_shape(h, prepared.weight, prepared.stride, prepared.padding, resample)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"conv2d: a {prepared.weight.shape[2]} x {prepared.weight.shape[2]} kernel with padding {prepared.padding} "
            f"does not fit in {describe(h)}"
        )
    if residual is None:
        if residual_resample is not None:
            raise ValueError("conv2d: residual_resample is of a residual, and there is none")
    elif (
        residual.ndim != 4
        or [*residual.shape[:2], *_resampled_sizes(residual, residual_resample)] != shape
        or residual.dtype != h.dtype
    ):
        resampled = "" if residual_resample is None else f" once resampled ({residual_resample})"
        raise ValueError(f"conv2d: residual must be {h.dtype} of shape {shape}{resampled}, got {describe(residual)}")


def _output_shape(h: Tensor, weight: Tensor, stride: int, padding: int, resample: str | None) -> list[int]:
    sizes = ((s + 2 * padding - weight.shape[2]) // stride + 1 for s in _resampled_sizes(h, resample))
    return [h.shape[0], weight.shape[0], *sizes]


def _resampled_sizes(t: Tensor, resample: str | None) -> list[int]:
    return [2 * s if resample == "nearest" else s // 2 if resample == "average" else s for s in t.shape[2:]]


torch.library.define(
    "cmfast::conv2d",
    "(Tensor h, Tensor? skip, Tensor weight, Tensor? bias, Tensor? packed, int tile, bool transformed, int stride, "
    "int padding, ScalarType dtype, str? resample, Tensor? gain, Tensor? offset, bool silu, Tensor? residual, "
    "str? residual_resample, bool moments, str? backend) -> (Tensor out, Tensor moments)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::conv2d", "default")
def _conv2d(h, skip, weight, bias, packed, *rest):
    *others, backend = rest
    if packed is None and (name := chosen(backend)) in ("auto", "cpu"):
        if name == "cpu":
            raise BackendError(
                "backend 'cpu' cannot serve conv2d: the weights were prepared without its kernels: prepare them here"
            )
        backend = "reference"
    tensors = [t for t in (h, skip, weight, bias, *others) if isinstance(t, Tensor)]
    return resolve("conv2d", tensors, backend)(h, skip, weight, bias, packed, *others)


@torch.library.register_fake("cmfast::conv2d")
def _conv2d_fake(h, skip, weight, bias, packed, tile, transformed, stride, padding, dtype, resample, *rest):
    shape = _output_shape(h, weight, stride, padding, resample)
    out = torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=image_format(h))
    wants_moments = rest[5]
    return out, h.new_empty((shape[0], 2, shape[1]) if wants_moments else 0, dtype=torch.float32)
