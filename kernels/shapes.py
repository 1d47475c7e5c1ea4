"""The operators of the released networks, at the shapes and in the forms in which those networks call them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import split_qkv
from .conv_arguments import ConvArguments


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        op: the operator.
        shape: of its first argument, and of others that differ.
        layout: order of the dimensions in memory.
        form: the arguments that were given.
        dtype: of the tensors.
        arguments: those of a backend's function, tensors without memory among them.
        flops: multiplications and additions of the formula, part by part where it has parts of their own launches.
    """

    op: str
    shape: str
    layout: str
    form: str
    dtype: str
    arguments: tuple[Any, ...]
    flops: tuple[int, ...]

    def flops_of(self, launches: int) -> tuple[int, ...]:
        """Those of each launch; of a launch for each part, or all of them in one."""
        return self.flops if launches == len(self.flops) else (sum(self.flops),) * launches


def calls(
    ops: Sequence[str] | None = None, dtype: torch.dtype | None = None, batch: int | None = None
) -> Iterator[Call]:
    """Yield the calls of the operators (None: of all), each once.

    They have the networks' own dtypes and batches, or all of them this one: timesteps are float32 in any case.
    """
    for op in ops or OPERATORS:
        seen = set()
        for call in OPERATORS[op](dtype, batch):
            key = call.shape, call.layout, call.form, call.dtype
            if key not in seen:
                yield call
            seen.add(key)


def _of(batch: int | None, *shapes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shapes with this batch, where one is given."""
    return tuple((batch or n, *others) for n, *others in shapes)


def _meta(shape: Sequence[int], dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "nhwc" else x


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(*shapes: Sequence[int]) -> str:
    return " ".join("x".join(map(str, shape)) for shape in shapes)


# Images of imagenet64 and LSUN-256, and latents of a latent consistency model.
_SAMPLES = ((1, 3, 64, 64), (16, 3, 64, 64), (1, 3, 256, 256), (1, 4, 128, 128))


def step_call(shape: Sequence[int], layout: str, dtype: torch.dtype, seeded: bool) -> Call:
    """The consistency step of samples [N, C, *spatial]: `denoised` alone, or (seeded) all three outputs with noise."""
    x = _meta(shape, dtype, layout)
    seed = 1 if seeded else None
    arguments = (x, x.clone(), [None] * 5, [0.5] * 5, -1.0, 1.0, None, seed, 1, 0, seeded, seeded)
    form = "clip seed input_scale" if seeded else "clip"
    flops = (x.numel() * (7 if seeded else 3),)
    return Call("consistency_step", _size(shape), layout, form, _name(dtype), arguments, flops)


def _consistency_steps(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    dtypes = (torch.bfloat16, torch.float32) if dtype is None else (dtype,)
    for choice in itertools.product(_of(batch, *_SAMPLES), ("nchw", "nhwc"), dtypes, (False, True)):
        yield step_call(*choice)


def step_gradient_call(shape: Sequence[int], layout: str, dtype: torch.dtype) -> Call:
    """The gradients of a clipped consistency step of samples [N, C, *spatial], from those of denoised and sample."""
    x = _meta(shape, dtype, layout)
    arguments = ([x.clone(), x.clone(), None], x, x.clone(), [None] * 5, [0.5] * 5, -1.0, 1.0, None)
    form = "clip grads of denoised, sample"
    flops = (x.numel() * 8,)
    return Call("consistency_step_backward", _size(x.shape), layout, form, _name(dtype), arguments, flops)


def _consistency_step_gradients(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    dtypes = (torch.bfloat16, torch.float32) if dtype is None else (dtype,)
    for choice in itertools.product(_of(batch, (16, 3, 64, 64)), ("nchw", "nhwc"), dtypes):
        yield step_gradient_call(*choice)


# Shapes of x (of h and skip where there are two), layout, dtype and arguments: imagenet64's levels and joins, the first
# and the deepest of LSUN-256, and a batch.
_NORMS = (
    (((1, 192, 64, 64),), "nhwc", torch.bfloat16, "affine silu"),
    (((1, 192, 64, 64),), "nchw", torch.bfloat16, "affine silu"),
    (((1, 192, 64, 64),), "nhwc", torch.float32, "affine silu"),
    (((16, 192, 64, 64),), "nhwc", torch.bfloat16, "affine silu"),
    (((1, 384, 32, 32),), "nhwc", torch.bfloat16, "affine film silu"),
    (((1, 576, 16, 16),), "nhwc", torch.bfloat16, "affine"),
    (((1, 768, 8, 8),), "nhwc", torch.bfloat16, "affine film silu"),
    (((1, 768, 8, 8),), "nchw", torch.bfloat16, "affine film silu"),
    (((1, 192, 64, 64), (1, 192, 64, 64)), "nhwc", torch.bfloat16, "affine silu"),
    (((1, 768, 16, 16), (1, 576, 16, 16)), "nhwc", torch.bfloat16, "affine silu"),
    (((1, 256, 256, 256),), "nhwc", torch.float16, "affine add silu"),
    (((1, 1024, 8, 8), (1, 1024, 8, 8)), "nhwc", torch.float16, "affine silu"),
)
_GROUPS = 32


def _norm_arguments(shapes, layout: str, dtype: torch.dtype, form: str):
    h, skip, *_ = [*(_meta(shape, dtype, layout) for shape in shapes), None]
    n, c = h.shape[0], sum(shape[1] for shape in shapes)
    weight, bias = _meta((c,), dtype), _meta((c,), dtype)
    add = _meta((n, c), dtype) if "add" in form else None
    scale, shift = _meta((n, 2 * c), dtype).chunk(2, 1) if "film" in form else (None, None)
    return h, skip, weight, bias, add, scale, shift, "silu" in form


def norm_call(
    shapes: Sequence[Sequence[int]], layout: str, dtype: torch.dtype, form: str, groups: int = _GROUPS
) -> Call:
    """Group norm of x (of h and skip where there are two shapes); form names what is fused: "affine add film silu"."""
    h, skip, weight, bias, *rest = _norm_arguments(shapes, layout, dtype, form)
    arguments = (h, skip, groups, weight, bias, 1e-5, *rest)
    elements = sum(math.prod(shape) for shape in shapes)
    flops = (4 * elements, 6 * elements)  # statistics and application, in two launches or in one
    return Call("group_norm", _size(*shapes), layout, form, _name(dtype), arguments, flops)


def _group_norms(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for shapes, layout, own, form in _NORMS:
        yield norm_call(_of(batch, *shapes), layout, dtype or own, form)


def norm_gradient_call(
    shapes: Sequence[Sequence[int]], layout: str, dtype: torch.dtype, form: str, groups: int = _GROUPS
) -> Call:
    """The gradients of `norm_call`'s group norm."""
    h, skip, weight, bias, *rest = _norm_arguments(shapes, layout, dtype, form)
    grad = _meta((h.shape[0], weight.shape[0], *h.shape[2:]), dtype, layout)
    statistics = [_meta((h.shape[0], groups), torch.float32) for _ in range(2)]
    arguments = (grad, h, skip, groups, weight, bias, *rest, *statistics)
    flops = (14 * grad.numel(), 16 * grad.numel())
    return Call("group_norm_backward", _size(*shapes), layout, form, _name(dtype), arguments, flops)


def _group_norm_gradients(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for shapes, layout, own, form in _NORMS[:9]:
        yield norm_gradient_call(_of(batch, *shapes), layout, dtype or own, form)


# As _NORMS, and what is pooled after it: the levels and joins of imagenet64, the first of LSUN-256.
_APPLIED_NORMS = (
    (((1, 192, 64, 64),), "nhwc", torch.bfloat16, "affine silu"),
    (((1, 192, 64, 64),), "nhwc", torch.float32, "affine silu"),
    (((1, 192, 64, 64),), "nhwc", torch.bfloat16, "affine silu average"),
    (((1, 384, 32, 32),), "nhwc", torch.bfloat16, "affine film silu"),
    (((1, 768, 8, 8),), "nhwc", torch.bfloat16, "affine film silu"),
    (((1, 768, 16, 16), (1, 576, 16, 16)), "nhwc", torch.bfloat16, "affine silu"),
    (((1, 256, 256, 256),), "nhwc", torch.float16, "affine add silu"),
)


def moments_call(shape: Sequence[int], layout: str, dtype: torch.dtype) -> Call:
    """The moments of the channels of x [N, C, *spatial]."""
    x = _meta(shape, dtype, layout)
    return Call("channel_moments", _size(shape), layout, "", _name(dtype), (x,), (4 * x.numel(),))


def _channel_moments(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for i in (0, 1, 3, 4, 6):
        shapes, layout, own, _ = _APPLIED_NORMS[i]
        (shape,) = _of(batch, shapes[0])
        yield moments_call(shape, layout, dtype or own)


def _moments(shapes: Sequence[Sequence[int]]) -> list[Tensor | None]:
    return [*(_meta((n, 2, c), torch.float32) for n, c, *_ in shapes), None][:2]


def fold_call(shapes: Sequence[Sequence[int]], dtype: torch.dtype, form: str, groups: int = _GROUPS) -> Call:
    """A group norm of x (of h and skip where there are two shapes) folded to gain and offset."""
    _, _, weight, bias, add, scale, shift, _ = _norm_arguments(shapes, "nchw", dtype, form)
    arguments = (*_moments(shapes), math.prod(shapes[0][2:]), groups, weight, bias, 1e-5, add, scale, shift)
    flops = (20 * len(weight) * shapes[0][0],)
    return Call("fold_group_norm", _size(*shapes), "", form, _name(dtype), arguments, flops)


def _fold_group_norms(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for i in (0, 3, 5):
        shapes, _, own, form = _APPLIED_NORMS[i]
        yield fold_call(_of(batch, *shapes), dtype or own, form.removesuffix(" silu"))


def applied_norm_call(
    shapes: Sequence[Sequence[int]], layout: str, dtype: torch.dtype, form: str, groups: int = _GROUPS
) -> Call:
    """`norm_call`'s group norm by given moments; form "... average" pools it."""
    h, skip, weight, bias, *rest = _norm_arguments(shapes, layout, dtype, form)
    resample = "average" if "average" in form else None
    arguments = (h, skip, *_moments(shapes), groups, weight, bias, 1e-5, *rest, resample)
    flops = (6 * sum(math.prod(shape) for shape in shapes),)
    return Call("apply_group_norm", _size(*shapes), layout, form, _name(dtype), arguments, flops)


def _applied_norms(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for shapes, layout, own, form in _APPLIED_NORMS:
        yield applied_norm_call(_of(batch, *shapes), layout, dtype or own, form)


# Shape, layout, dtype and form: a latent model's tokens, then images of networks with layer and RMS norms.
_CHANNEL_NORMS = (
    ((4096, 320), "tokens", torch.bfloat16, "layer affine"),
    ((1024, 640), "tokens", torch.float16, "layer affine"),
    ((64, 1280), "tokens", torch.float32, "layer affine"),
    ((1, 64, 64, 64), "nhwc", torch.bfloat16, "rms affine film silu"),
    ((1, 128, 32, 32), "nchw", torch.bfloat16, "layer affine"),
)


def channel_norm_call(shape: Sequence[int], layout: str, dtype: torch.dtype, form: str) -> Call:
    """Layer norm or RMS norm of x [N, C, *spatial]; form is "layer ..." or "rms ...", with "affine", "film", "silu"."""
    x, _, weight, bias, _, scale, shift, silu = _norm_arguments((shape,), layout, dtype, form)
    arguments = (x, weight, bias, 1e-5, "layer" in form, 0.0, scale, shift, silu)
    return Call("channel_norm", _size(shape), layout, form, _name(dtype), arguments, (8 * x.numel(),))


def _channel_norms(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for (n, *others), layout, own, form in _CHANNEL_NORMS:
        count = n if batch is None else n * batch if layout == "tokens" else batch
        yield channel_norm_call((count, *others), layout, dtype or own, form)


# N, H, T, S, D, dtype, form: imagenet64's three levels, LSUN-256's widest, a latent model's cross-attention.
_ATTENTIONS = (
    (1, 6, 1024, 1024, 64, torch.bfloat16, "packed 3hd"),
    (1, 9, 256, 256, 64, torch.bfloat16, "packed h3d"),
    (1, 12, 64, 64, 64, torch.bfloat16, "packed 3hd"),
    (16, 6, 1024, 1024, 64, torch.bfloat16, "packed 3hd"),
    (1, 6, 1024, 1024, 64, torch.float32, "packed 3hd"),
    (1, 8, 1024, 1024, 64, torch.float16, "packed 3hd"),
    (1, 8, 4096, 77, 40, torch.float16, "cross"),
    (1, 8, 1024, 77, 80, torch.float16, "cross"),
    (1, 8, 256, 77, 128, torch.float16, "cross"),
)


def _attention_arguments(n: int, heads: int, t: int, s: int, d: int, dtype: torch.dtype, form: str):
    """q, k and v: views of one projection [N, T, 3·H·D], or q of the image and k, v of the text."""
    if form == "cross":
        return [_meta((n, length, heads * d), dtype).view(n, length, heads, d).transpose(1, 2) for length in (t, s, s)]
    return split_qkv(_meta((n, t, 3 * heads * d), dtype), heads, form.removeprefix("packed "))


def attention_call(n: int, heads: int, t: int, s: int, d: int, dtype: torch.dtype, form: str) -> Call:
    """Attention of q [N, H, T, D] and k, v [N, H, S, D]; form is "packed 3hd", "packed h3d" (T = S) or "cross"."""
    q, k, v = _attention_arguments(n, heads, t, s, d, dtype, form)
    flops = (4 * n * heads * t * s * d,)
    return Call("attention", _size(q.shape, k.shape), "ntc", form, _name(dtype), (q, k, v, d**-0.5), flops)


def _attentions(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for n, heads, t, s, d, own, form in _ATTENTIONS:
        yield attention_call(batch or n, heads, t, s, d, dtype or own, form)


def attention_gradient_call(n: int, heads: int, t: int, s: int, d: int, dtype: torch.dtype, form: str) -> Call:
    """The gradients of `attention_call`'s attention."""
    q, k, v = _attention_arguments(n, heads, t, s, d, dtype, form)
    lse = _meta((n, heads, t), torch.float32)
    product = 2 * n * heads * t * s * d
    flops = (3 * product, 4 * product)  # dq, then dk and dv
    arguments = (q.clone(), q, k, v, q.clone(), lse, d**-0.5)
    return Call("attention_backward", _size(q.shape, k.shape), "ntc", form, _name(dtype), arguments, flops)


def _attention_gradients(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for n, heads, t, s, d, own, form in (*_ATTENTIONS[:3], _ATTENTIONS[4], _ATTENTIONS[6]):
        yield attention_gradient_call(batch or n, heads, t, s, d, dtype or own, form)


# N, C of h, of skip (0: none), Cout, height and width, kernel, dtype, form: imagenet64's levels (the first also with a
# folded norm), a join, resampled blocks, the first and the last layer, projections of attention and of the embedding;
# in float32; LSUN-256; a batch.
_CONVOLUTIONS = (
    (1, 192, 0, 192, 64, 3, torch.bfloat16, "residual moments"),
    (1, 192, 0, 192, 64, 3, torch.bfloat16, "affine silu residual moments"),
    (1, 384, 0, 384, 32, 3, torch.bfloat16, "residual moments"),
    (1, 576, 0, 576, 16, 3, torch.bfloat16, "moments"),
    (1, 768, 0, 768, 8, 3, torch.bfloat16, "residual moments"),
    (1, 192, 192, 192, 64, 3, torch.bfloat16, "moments"),
    (1, 384, 0, 384, 16, 3, torch.bfloat16, "nearest moments"),
    (1, 192, 0, 192, 64, 3, torch.bfloat16, "affine silu average moments"),
    (1, 3, 0, 192, 64, 3, torch.bfloat16, "moments"),
    (1, 192, 0, 3, 64, 3, torch.bfloat16, ""),
    (1, 384, 0, 1152, 32, 1, torch.bfloat16, "affine"),
    (1, 576, 0, 576, 16, 1, torch.bfloat16, "residual moments"),
    (1, 768, 0, 1536, 1, 1, torch.bfloat16, "silu"),
    (1, 192, 0, 192, 64, 3, torch.float32, "residual moments"),
    (1, 256, 0, 256, 256, 3, torch.float16, "residual moments"),
    (16, 192, 0, 192, 64, 3, torch.bfloat16, "residual moments"),
)


def conv_call(
    n: int, channels: int, skip: int, columns: int, size: int, kernel: int, dtype: torch.dtype, form: str
) -> Call:
    """A convolution of square images; form names what is fused: "affine silu nearest average residual moments"."""
    resample = next((name for name in ("nearest", "average") if name in form), None)
    c, h = channels + skip, _meta((n, channels, size, size), dtype, "nhwc")
    a = ConvArguments(
        h,
        _meta((n, skip, size, size), dtype, "nhwc") if skip else None,
        _meta((columns, c, kernel, kernel), dtype),
        _meta((columns,), torch.float32),
        _meta((kernel * kernel * c, columns), dtype),
        tile=1,
        transformed=False,
        stride=(1, 1),
        padding=(kernel // 2,) * 4,
        dtype=dtype,
        resample=resample,
        gain=_meta((n, c), torch.float32) if "affine" in form else None,
        offset=_meta((n, c), torch.float32) if "affine" in form else None,
        silu="silu" in form,
        moments="moments" in form,
    )
    shape = a.output_shape()
    if "residual" in form:
        a = a._replace(residual=_meta(shape, dtype, "nhwc"))
    input_flops = 0 if a.gain is None and not a.silu and resample != "average" else 6 * h.numel()
    flops = (input_flops, 2 * math.prod(shape) * c * kernel * kernel)
    shapes = [(n, channels, size, size), *([(n, skip, size, size)] if skip else []), (columns, c, kernel, kernel)]
    return Call("conv2d", _size(*shapes), "nhwc", form, _name(dtype), (a,), flops)


def _convolutions(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for n, channels, skip, columns, size, kernel, own, form in _CONVOLUTIONS:
        yield conv_call(batch or n, channels, skip, columns, size, kernel, dtype or own, form)


# N, F: imagenet64's, LSUN-256's, a latent model's, a batch.
_TIMESTEPS = ((1, 96), (1, 128), (1, 160), (16, 96))


def timesteps_call(n: int, count: int) -> Call:
    """The sinusoids of timesteps [N] for F = `count` frequencies."""
    t, frequencies = _meta((n,), torch.float32), _meta((count,), torch.float32)
    flops = (40 * n * count,)  # two polynomials, and the reduction of the angle
    arguments = (t, frequencies, 1.0, False)
    return Call("timestep_embedding", _size(t.shape, frequencies.shape), "", "", "float32", arguments, flops)


def _timestep_embeddings(dtype: torch.dtype | None, batch: int | None) -> Iterator[Call]:
    for n, count in _TIMESTEPS:
        yield timesteps_call(batch or n, count)


#: The calls of each operator.
OPERATORS: dict[str, Callable[[torch.dtype | None, int | None], Iterator[Call]]] = {
    "group_norm": _group_norms,
    "group_norm_backward": _group_norm_gradients,
    "channel_moments": _channel_moments,
    "fold_group_norm": _fold_group_norms,
    "apply_group_norm": _applied_norms,
    "channel_norm": _channel_norms,
    "attention": _attentions,
    "attention_backward": _attention_gradients,
    "consistency_step": _consistency_steps,
    "consistency_step_backward": _consistency_step_gradients,
    "conv2d": _convolutions,
    "timestep_embedding": _timestep_embeddings,
}
