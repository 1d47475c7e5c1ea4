"""Convolution with prepared weights, and with what surrounds it in a diffusion U-Net done as its input is read.

    u = x · gain + offset                      a group norm folded to one multiply-add a channel: gain, offset [N, C]
    u = u · sigmoid(u)                         silu
    u = nearest upsampling or average pooling  resample
    y = conv(u, weight) + bias + residual          the residual resampled as well

x is [N, C, H, W], or a pair (h, skip) that stands for their concatenation along C. The weights are prepared once: of
3 × 3 kernels of stride 1, for Winograd's minimal filtering (Lavin and Gray 2016, "Fast Algorithms for Convolutional
Neural Networks") of 2 × 2 or 4 × 4 outputs a tile, with 2.25 or 4 times fewer products.

Or u is h · act(gate) of a pair (h, gate) of one shape, as in the feed-forward layers of transformers (Shazeer 2020,
"GLU Variants Improve Transformer", equations 5 and 6), whose second linear layer is a convolution of 1 × 1.

Audio [N, C, L] is convolved as images of one row. Of video [N, C, D, H, W], each output image is the sum of
convolutions of neighbouring input images: their sum is taken among Winograd's points, as that over the channels is.
Only the height and the width of a video are resampled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import direct, remembered
from .backends import BackendError, available, chosen, resolve
from .conv_arguments import GATES, RESAMPLES, ConvArguments, output_sizes, resampled_sizes
from .conv_forms import ConvForm, choose_form
from .conv_weights import pack
from .layout import concatenated_shape, describe, empty_image
from .transforms import refuse_gradients


class PreparedConv(NamedTuple):
    """The weights of a convolution as `conv2d` takes them; tensors and numbers, so that it can be saved and loaded.

    Attributes:
        weight: [Cout, Cin, *kernel], as it was given.
        bias: [Cout].
        packed: as the kernels read it: of the CPU on any instruction set, or of the GPU; None where there are none.
        tile: outputs a side of a Winograd tile; 1 for the direct form.
        transformed: whether Winograd's weights are packed so; else the 3 x 3 kernels, transformed at every use.
        stride: of each spatial dimension.
        padding: before and after each.
        dtype: of the products; sums are float32.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None
    tile: int
    transformed: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dtype: torch.dtype


class ConvOutput(NamedTuple):
    """What `conv2d` returns.

    Attributes:
        out: [N, Cout, *spatial].
        moments: [N, 2, Cout], float32; None where they were not asked for.
    """

    out: Tensor
    moments: Tensor | None


def prepare_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dtype: torch.dtype = torch.float32,
    depth: int = 1,
    height: int = 1,
    width: int,
    tile: int | None = None,
    transformed: bool | None = None,
) -> PreparedConv:
    """Prepare the weights of a convolution for `conv2d`.

    Args:
        weight: [Cout, Cin, k], [Cout, Cin, kh, kw] or [Cout, Cin, kd, kh, kw], any floating dtype.
        bias: [Cout].
        stride: of all spatial dimensions, or one for each.
        padding: zeros on all sides, or one number for each spatial dimension, or two for each: before it and after it,
            so (top, bottom, left, right) of images.
        dtype: float32, or bfloat16 to round both operands of the products, on a GPU float16 as well; sums are float32.
        depth: of the input, where weights have three spatial dimensions.
        height: rows of the input, after it is resampled; where weights have two or three.
        width: columns. The form is chosen for this size, and serves any.
        tile: 4 or 2 for Winograd's form with so many outputs a side, 1 for the direct form; None chooses. With
            bfloat16 a tile of 4 costs three times the error of the others: it is taken only where it is asked for.
        transformed: whether Winograd's weights are packed transformed, 4 or 16 / 9 times larger, or as they are, to be
            transformed at every use, in float32 alone; None chooses. With a tile of 1, on a processor with AMX:
            products of float32 as three of bfloat16 halves, to 4.4e-6.

    Returns:
        What `conv2d` takes: the weights packed for their device.

    Raises:
        ValueError: shapes, dtypes or a form that do not fit.
    """
    dims = weight.ndim - 2
    if dims not in (1, 2, 3) or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            "prepare_conv: weight must be a floating-point tensor [Cout, Cin, *kernel] of one to three spatial "
            f"dimensions, got {describe(weight)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"prepare_conv: bias must be floating point of shape [{len(weight)}], got {describe(bias)}")
    strides, paddings = _numbers("stride", stride, dims), _numbers("padding", padding, dims, 2 * dims)
    sides = paddings if len(paddings) == 2 * dims else tuple(p for p in paddings for _ in range(2))
    if min(*strides, depth, height, width) < 1 or min(sides) < 0:
        raise ValueError(
            "prepare_conv: stride, depth, height and width must be positive and padding not negative, "
            f"got {stride}, {depth}, {height}, {width} and {padding}"
        )
    if any(size != 1 for size in (depth, height)[: 3 - dims]):
        raise ValueError(
            f"prepare_conv: weights {list(weight.shape)} are of {dims} spatial dimensions: depth and height of others "
            f"must be 1, got {depth} and {height}"
        )
    if dtype not in (torch.float32, torch.bfloat16) and not (weight.is_cuda and dtype == torch.float16):
        raise ValueError(f"prepare_conv: dtype must be float32 or bfloat16, or float16 on a GPU, got {dtype}")
    outputs = output_sizes((depth, height, width)[3 - dims :], weight.shape[2:], strides, sides)
    try:
        choose = _only_form if weight.is_cuda else choose_form
        form = choose(weight.shape, strides, outputs, dtype, tile=tile, transformed=transformed)
    except ValueError as error:
        raise ValueError(f"prepare_conv: {error}") from None
    weight, bias = weight.detach(), None if bias is None else bias.detach().contiguous()
    return PreparedConv(weight, bias, _packed(weight, form), form.tile, form.transformed, strides, sides, dtype)


def _only_form(
    weight: Sequence[int],
    stride: Sequence[int],
    outputs: Sequence[int],
    dtype: torch.dtype,
    *,
    tile: int | None,
    transformed: bool | None,
) -> ConvForm:
    """What `choose_form` does for a GPU."""
    if tile not in (None, 1) or transformed:
        raise ValueError(f"a GPU has the direct form (1, False) alone: got {(tile, transformed)}")
    return ConvForm(1, False, dtype)


def _packed(weight: Tensor, form: ConvForm) -> Tensor | None:
    """The weights as the kernels of their device read them; None where there are none."""
    if weight.is_cuda and any(available(name, "conv2d", (weight,))[0] for name in ("triton", "cuda")):
        return pack(weight, form.dtype)
    if available("cpu", "conv2d", (weight,))[0]:
        from .cpu.conv import pack as pack_for_cpu

        return pack_for_cpu(weight, *form)
    return None


def _numbers(name: str, given: int | Sequence[int], *lengths: int) -> tuple[int, ...]:
    """One number for each of lengths[0] dimensions, or as many as another length says."""
    numbers = (given,) * lengths[0] if isinstance(given, int) else tuple(given)
    if len(numbers) not in lengths:
        known = " or ".join(map(str, lengths))
        raise ValueError(f"prepare_conv: {name} must be one number or {known} of them, got {given}")
    return numbers


def conv2d(
    x: Tensor | tuple[Tensor, Tensor],
    prepared: PreparedConv,
    *,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    silu: bool = False,
    gate: str | None = None,
    resample: str | None = None,
    residual: Tensor | None = None,
    residual_resample: str | None = None,
    relu: bool = False,
    moments: bool = False,
    backend: str | None = None,
) -> ConvOutput:
    """Convolve x with prepared weights. For inference: there are no gradients.

    Args:
        x: [N, C, *spatial] of any floating dtype, with the spatial dimensions of the weights, fastest in channels_last,
            or a pair `(h, skip)` of tensors [N, C1, *spatial] and [N, C2, *spatial] read as their concatenation along
            the channels; with `gate`, a pair `(h, gate)` of one shape [N, C, *spatial].
        prepared: what `prepare_conv` returned.
        gain: [N, C], multiplies x; together with offset.
        offset: [N, C], added to it.
        silu: apply SiLU to the input, after gain and offset.
        gate: None, or the activation of a gate: x is a pair (h, gate), and the input is h · gelu(gate) by "gelu", its
            approximation by tanh by "gelu_tanh", or h · silu(gate) by "silu". Without gain, offset and silu.
        resample: None, "nearest" for nearest upsampling by 2 of the activated input, or "average" for its average
            pooling by 2; not of the depth.
        residual: of the shape and dtype of the output, added to it.
        residual_resample: None, "nearest" or "average", as `resample`, of a residual of half or double that resolution.
        relu: apply ReLU to the output, after all that is added.
        moments: also return the output channels' means and sums of squared deviations from them, for the next group
            norm's `fold_group_norm`.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        ConvOutput(out, moments): out in the dtype of x, channels last in memory where the channels of x (of h) are
        adjacent. Products are taken of operands in the dtype of the preparation, all else is float32. Winograd's forms
        err by at most 8 ε Σ |Aᵀ|·((|G||w||Gᵀ|) ⊙ (|Bᵀ||u||B|))·|A|, the sum over the input channels and the depth,
        ε the spacing of float32 at 1; in bfloat16, by half of that and once such a sum with the spacing of bfloat16.
        The roundings of what is added and of out come on top. The tests hold them to it.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: an input requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    h, skip = x if isinstance(x, tuple | list) else (x, None)
    given = (gain, offset, silu, gate, residual, residual_resample, relu, moments)
    arguments = ConvArguments(h, skip, *prepared, resample, *given)
    if (found := direct.conv2d(arguments, backend)) is not None:
        return ConvOutput(found[0], found[1] if moments else None)
    _check(arguments)
    refuse_gradients("conv2d", "prepared weights serve inference", h, skip, gain, offset, residual)
    out, sums = torch.ops.cmfast.conv2d(*arguments, backend)
    return ConvOutput(out, sums if moments else None)


def _check(a: ConvArguments) -> None:
    h, skip, residual, dims = a.h, a.skip, a.residual, a.weight.ndim - 2
    if h.ndim != dims + 2 or not h.is_floating_point():
        raise ValueError(
            f"conv2d: x must be a floating-point tensor [N, C, {', '.join('DHW'[-dims:])}], as the weights "
            f"{list(a.weight.shape)} have it, got {describe(h)}"
        )
    if skip is not None and (
        skip.ndim != h.ndim or skip.shape[0] != h.shape[0] or skip.shape[2:] != h.shape[2:] or skip.dtype != h.dtype
    ):
        raise ValueError(
            "conv2d: a pair (h, skip) must agree in everything but the number of channels, "
            f"got {describe(h)} and {describe(skip)}"
        )
    if a.gate is not None:
        _check_gate(a)
    n, c = concatenated_shape(h, None if a.gate else skip)[:2]
    if c != a.weight.shape[1]:
        raise ValueError(f"conv2d: the weights were prepared for {a.weight.shape[1]} channels, got {c}")
    if (a.gain is None) != (a.offset is None):
        raise ValueError("conv2d: gain and offset belong together: give both or neither")
    for name, t in (("gain", a.gain), ("offset", a.offset)):
        if t is not None and (t.shape != (n, c) or not t.is_floating_point()):
            raise ValueError(f"conv2d: {name} must be a floating-point tensor [{n}, {c}], got {describe(t)}")
    for name, value in (("resample", a.resample), ("residual_resample", a.residual_resample)):
        if value not in RESAMPLES:
            raise ValueError(f'conv2d: {name} must be None, "nearest" or "average", got {value!r}')
    shape = a.output_shape()
    if min(shape[2:]) < 1:
        raise ValueError(
            f"conv2d: a {' x '.join(map(str, a.weight.shape[2:]))} kernel with padding {a.padding} does not fit in "
            f"{describe(h)}{'' if a.resample is None else f' once resampled ({a.resample})'}"
        )
    if residual is None:
        if a.residual_resample is not None:
            raise ValueError("conv2d: residual_resample is of a residual, and there is none")
    elif (
        residual.ndim != h.ndim
        or [*residual.shape[:2], *resampled_sizes(residual.shape[2:], a.residual_resample)] != shape
        or residual.dtype != h.dtype
    ):
        resampled = "" if a.residual_resample is None else f" once resampled ({a.residual_resample})"
        raise ValueError(f"conv2d: residual must be {h.dtype} of shape {shape}{resampled}, got {describe(residual)}")


def _check_gate(a: ConvArguments) -> None:
    if a.gate not in GATES:
        raise ValueError(f"conv2d: gate must be None or one of {', '.join(filter(None, GATES))}, got {a.gate!r}")
    if a.skip is None or a.skip.shape != a.h.shape:
        got = "no pair" if a.skip is None else f"{describe(a.h)} and {describe(a.skip)}"
        raise ValueError(f"conv2d: with a gate, x must be a pair (h, gate) of one shape, got {got}")
    if a.gain is not None or a.offset is not None or a.silu:
        raise ValueError("conv2d: a gated input has no gain, offset or silu")


torch.library.define(
    "cmfast::conv2d",
    "(Tensor h, Tensor? skip, Tensor weight, Tensor? bias, Tensor? packed, int tile, bool transformed, int[] stride, "
    "int[] padding, ScalarType dtype, str? resample, Tensor? gain, Tensor? offset, bool silu, str? gate, "
    "Tensor? residual, str? residual_resample, bool relu, bool moments, str? backend) -> (Tensor out, Tensor moments)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::conv2d", "default")
def _conv2d(*arguments):
    *others, backend = arguments
    a = ConvArguments(*others)
    if a.packed is None and a.h.is_cpu and (name := chosen(backend)) in ("auto", "cpu"):
        if name == "cpu":
            raise BackendError(
                "backend 'cpu' cannot serve conv2d: the weights were prepared without its kernels: prepare them here"
            )
        backend = "reference"
    tensors = [t for t in a._replace(packed=None) if isinstance(t, Tensor)]
    return remembered.serve("conv2d", arguments[-1], a, resolve("conv2d", tensors, backend, (a,)), a)


@torch.library.register_fake("cmfast::conv2d")
def _conv2d_fake(*arguments):
    a = ConvArguments(*arguments[:-1])
    shape = a.output_shape()
    return empty_image(a.h, shape), a.h.new_empty((shape[0], 2, shape[1]) if a.moments else 0, dtype=torch.float32)
