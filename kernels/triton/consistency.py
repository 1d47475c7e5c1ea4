"""The consistency step and its derivative, one launch each.

One program takes a tile of one sample: `index` runs over the sample's elements in the order of x's memory, and each
tensor's address is its digits in base SIZES times that tensor's strides. Dimensions that are adjacent in every tensor
are merged first, so dense tensors of one format, whichever it is, have one dimension, no digits, and 16-byte accesses;
SIZES and the strides are compile-time constants and depend on the shape only where tensors of different formats,
slices or broadcasts meet. Everything else that changes between calls (coefficients, bounds, seed, sizes) is an
argument of the launch and compiles nothing anew.

The noise comes in blocks: one Philox call makes the normals of 4 elements that are consecutive in [C, *spatial]
order. For contiguous samples these are 4 consecutive elements of memory, and the thread that makes them uses them.
In a channels_last sample the neighbours of an element in memory are the other channels of its position, of C different
Philox blocks, and calling Philox for every element would cost four times the work of the noise, which is most of the
kernel's. So a program takes P positions with all of their channels, makes the C·P normals by whole blocks, one row a
channel, and `tl.gather` turns the rows into memory order through shared memory. Any other order of memory, an image
whose positions are no multiple of 4, or very many channels: the tile runs in [C, *spatial] order, and the accesses are
strided. The integers are those of the reference in every case.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import recorder
from ..layout import empty_in_order
from .launch import Launch

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)

# Where the normals of a tile come from.
_NO_NOISE = tl.constexpr(0)
_GIVEN = tl.constexpr(1)
_CONSECUTIVE = tl.constexpr(2)
_GATHERED = tl.constexpr(3)

#: Channels up to which a channels_last sample's normals are gathered; beyond it a tile would hold few positions.
_MAX_GATHERED_CHANNELS = 64

#: Programs of four warps that fill a large chip, two a multiprocessor; where there would be fewer, they have one warp.
_MANY_PROGRAMS = 264


@triton.jit
def _philox(counter, draw, seed_high, key_0, key_1):
    """Philox4x32-10 of the counter (counter, draw, seed_high, 0): four tensors of 32-bit words."""
    c0 = counter
    c1 = draw
    c2 = seed_high
    c3 = tl.full((), 0, tl.uint32)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, _MULTIPLIER_0)
        high_1 = tl.umulhi(c2, _MULTIPLIER_1)
        low_0 = c0 * _MULTIPLIER_0
        low_1 = c2 * _MULTIPLIER_1
        c0 = high_1 ^ c1 ^ key_0
        c1 = low_1
        c2 = high_0 ^ c3 ^ key_1
        c3 = low_0
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _unit(word):
    """(2·(word >> 9) + 1)·2⁻²⁴, exactly."""
    return ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _box_muller(word_1, word_2):
    """The pair √(−2 ln u1)·(cos, sin)(2π u2)."""
    radius = tl.sqrt(-2.0 * tl.log(_unit(word_1)))
    # The angle in quarter turns is exact, and so are its nearest integer's distance f (at most 1/2) and quadrant: the
    # Taylor series of sin and cos(π/2·f) are then within rounding. The library's sin and cos would keep a stack frame
    # for the reduction of large angles.
    turns = 4.0 * _unit(word_2)
    nearest = tl.floor(turns + 0.5)
    f = turns - nearest
    g = f * f
    sin = f * (1.5707963 + g * (-0.64596410 + g * (0.079692626 + g * (-0.0046817541 + g * 0.00016044118))))
    cos = 1.0 + g * (-1.2337005 + g * (0.25366951 + g * (-0.020863481 + g * (0.00091926027 + g * -2.5202042e-05))))
    quadrant = nearest.to(tl.int32)
    swapped = (quadrant & 1) != 0
    first = tl.where(swapped, sin, cos)
    second = tl.where(swapped, cos, sin)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def _normals(block, draw, seed_high, key_0, key_1):
    """The normals of Philox blocks [..., Q], in order: [..., 4·Q]."""
    r0, r1, r2, r3 = _philox(block, draw, seed_high, key_0, key_1)
    z0, z1 = _box_muller(r0, r1)
    z2, z3 = _box_muller(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _offset(start, lane, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    """Address of element start + lane of a sample, in elements, as 64-bit integers."""
    index = start + lane
    offset = tl.zeros_like(index)
    for i in tl.static_range(len(STRIDES) - 1):
        size: tl.constexpr = SIZES[len(STRIDES) - 1 - i]
        stride: tl.constexpr = STRIDES[len(STRIDES) - 1 - i]
        offset += (index % size) * stride
        index = index // size
    return offset + index * STRIDES[0]


@triton.jit
def _load(pointer, sample_offset, start, lane, mask, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    offset = _offset(start, lane, SIZES, STRIDES)
    return tl.load(pointer + sample_offset + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, sample_offset, start, lane, value, mask, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    offset = _offset(start, lane, SIZES, STRIDES)
    tl.store(pointer + sample_offset + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _coefficient(value, n, STRIDE: tl.constexpr):
    """A float as it is, or sample n's element of a vector with a stride."""
    if STRIDE is not None:
        value = tl.load(value + n * STRIDE).to(tl.float32)
    return value


@triton.jit
def _seed_words(low, high):
    """The low and the high word of the seed: as they are or, without the high one, from the address `low`."""
    if high is None:
        seed = tl.load(low)
        low = seed
        high = seed >> 32
    return low.to(tl.uint32), high.to(tl.uint32)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "draw", "first_sample"])
def consistency_step_kernel(
    x,
    model_output,
    noise,
    denoised,
    sample,
    model_input,
    a,
    b,
    alpha,
    beta,
    input_scale,
    low,
    high,
    seed_low,
    seed_high,
    draw,
    first_sample,
    size,
    tiles,
    x_n,
    model_output_n,
    noise_n,
    out_n,
    SIZES: tl.constexpr,
    X: tl.constexpr,
    MODEL_OUTPUT: tl.constexpr,
    NOISE: tl.constexpr,
    OUT: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SOURCE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One tile of every output of the step."""
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    tile = (program % tiles).to(tl.int64)
    lane = tl.max_contiguous(tl.arange(0, TILE), VECTOR)
    if SOURCE == _GATHERED:
        POSITIONS: tl.constexpr = TILE // ROWS
        start = tile * (POSITIONS * CHANNELS)
        mask = (lane < POSITIONS * CHANNELS) & (start + lane < size)
    else:
        start = tile * TILE
        mask = start + lane < size

    a = _coefficient(a, n, COEFFICIENTS[0])
    b = _coefficient(b, n, COEFFICIENTS[1])
    x_value = _load(x, n * x_n, start, lane, mask, SIZES, X)
    model_output_value = _load(model_output, n * model_output_n, start, lane, mask, SIZES, MODEL_OUTPUT)
    value = a * x_value + b * model_output_value
    if low is not None:
        value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)
    _store(denoised, n * out_n, start, lane, value, mask, SIZES, OUT)

    if sample is not None:
        value = _coefficient(alpha, n, COEFFICIENTS[2]) * value
        if SOURCE != _NO_NOISE:
            beta = _coefficient(beta, n, COEFFICIENTS[3])
            if SOURCE == _GIVEN:
                z = _load(noise, n * noise_n, start, lane, mask, SIZES, NOISE)
            else:
                key_0, high = _seed_words(seed_low, seed_high)
                if first_sample.dtype.is_ptr():
                    first_sample = tl.load(first_sample)
                key_1 = (n + first_sample).to(tl.uint32)
                if SOURCE == _GATHERED:
                    channel = tl.arange(0, ROWS)[:, None].to(tl.int64)
                    first = channel * (size // CHANNELS // 4) + tile * (POSITIONS // 4)
                    block = first + tl.arange(0, POSITIONS // 4)[None, :]
                else:
                    block = start // 4 + tl.arange(0, TILE // 4)
                z = _normals(block.to(tl.uint32), draw.to(tl.uint32), high, key_0, key_1)
                if SOURCE == _GATHERED:
                    order = (lane % CHANNELS) * POSITIONS + lane // CHANNELS
                    z = tl.gather(tl.reshape(z, (TILE,)), tl.where(lane < POSITIONS * CHANNELS, order, 0), 0)
            value += beta * z
        _store(sample, n * out_n, start, lane, value, mask, SIZES, OUT)
        if model_input is not None:
            value = _coefficient(input_scale, n, COEFFICIENTS[4]) * value
            _store(model_input, n * out_n, start, lane, value, mask, SIZES, OUT)


@triton.jit
def consistency_step_backward_kernel(
    d_denoised,
    d_sample,
    d_input,
    x,
    model_output,
    dx,
    d_output,
    d_noise,
    a,
    b,
    alpha,
    beta,
    input_scale,
    low,
    high,
    size,
    tiles,
    d_denoised_n,
    d_sample_n,
    d_input_n,
    x_n,
    model_output_n,
    out_n,
    SIZES: tl.constexpr,
    D_DENOISED: tl.constexpr,
    D_SAMPLE: tl.constexpr,
    D_INPUT: tl.constexpr,
    X: tl.constexpr,
    MODEL_OUTPUT: tl.constexpr,
    OUT: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One tile of the gradients of x, model_output and a given noise."""
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * TILE
    lane = tl.max_contiguous(tl.arange(0, TILE), VECTOR)
    mask = start + lane < size

    a = _coefficient(a, n, COEFFICIENTS[0])
    b = _coefficient(b, n, COEFFICIENTS[1])
    gradient_sample = tl.zeros((TILE,), tl.float32)
    if d_sample is not None:
        gradient_sample += _load(d_sample, n * d_sample_n, start, lane, mask, SIZES, D_SAMPLE)
    if d_input is not None:
        input_scale = _coefficient(input_scale, n, COEFFICIENTS[4])
        gradient_sample += input_scale * _load(d_input, n * d_input_n, start, lane, mask, SIZES, D_INPUT)
    gradient = _coefficient(alpha, n, COEFFICIENTS[2]) * gradient_sample
    if d_denoised is not None:
        gradient += _load(d_denoised, n * d_denoised_n, start, lane, mask, SIZES, D_DENOISED)
    if low is not None:
        x_value = _load(x, n * x_n, start, lane, mask, SIZES, X)
        model_output_value = _load(model_output, n * model_output_n, start, lane, mask, SIZES, MODEL_OUTPUT)
        value = a * x_value + b * model_output_value
        gradient = tl.where((value >= low) & (value <= high), gradient, 0.0)
    _store(dx, n * out_n, start, lane, a * gradient, mask, SIZES, OUT)
    _store(d_output, n * out_n, start, lane, b * gradient, mask, SIZES, OUT)
    if d_noise is not None:
        value = _coefficient(beta, n, COEFFICIENTS[3]) * gradient_sample
        _store(d_noise, n * out_n, start, lane, value, mask, SIZES, OUT)


def consistency_step(*args) -> list[Tensor]:
    """Serve `cmfast.kernels.consistency_step`; arguments and results are those of the reference."""
    return _run(*plan_consistency_step(*args))


def consistency_step_backward(*args) -> list[Tensor]:
    """Serve the gradients of the consistency step; arguments and results are those of the reference."""
    return _run(*plan_consistency_step_backward(*args))


def _run(launches: list[Launch], outputs: list[Tensor]) -> list[Tensor]:
    for launch in launches:
        launch.run()
    return outputs


def plan_consistency_step(
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
    wants_sample: bool,
    wants_input: bool,
) -> tuple[list[Launch], list[Tensor]]:
    """The operator's launch and its outputs, still empty; reads no data and needs no GPU."""
    denoised = empty_in_order(x, x.shape)
    sample = empty_in_order(x, x.shape) if wants_sample else None
    model_input = empty_in_order(x, x.shape, model_output.dtype) if wants_input else None
    outputs = [t for t in (denoised, sample, model_input) if t is not None]
    size = math.prod(x.shape[1:])
    if not x.numel():
        return [], outputs

    source, channels = _NO_NOISE, 1
    order = _memory_order(x)
    if noise is not None:
        source = _GIVEN
    elif seed is not None and wants_sample:
        source, channels = _CONSECUTIVE, x.shape[1]
        spatial_then_channels = [d for d in (*range(2, x.ndim), 1) if x.shape[d] > 1]
        if (
            order == spatial_then_channels
            and order != sorted(order)
            and size // channels % 4 == 0
            and channels <= _MAX_GATHERED_CHANNELS
        ):
            source = _GATHERED
        else:
            order, channels = sorted(order), 1
    rows = triton.next_power_of_2(channels)
    sizes, strides = _merge(order, x, model_output, noise, denoised)
    tile, warps, vector = _tile(x.numel() * rows // channels, (x, model_output, *outputs))
    if source == _GATHERED and warps == 1:  # within one warp the gather would be a shuffle for each pair of registers
        tile, warps = 2 * tile, 2
    tiles = -(-size // (tile // rows * channels))
    word = functools.partial(recorder.derived, _signed_word)
    number = 0 if seed is None else seed
    launch = Launch(
        kernel=consistency_step_kernel,
        grid=(x.shape[0] * tiles,),
        args=(
            *(x, model_output, noise, denoised, sample, model_input),
            *_coefficients(vectors, scalars),
            *(low, high),
            *((seed, None) if isinstance(seed, Tensor) else (word(number), recorder.derived(_high_word, number))),
            *(word(draw), first_sample if isinstance(first_sample, Tensor) else word(first_sample)),
            *(size, tiles, x.stride(0), model_output.stride(0), 0 if noise is None else noise.stride(0)),
            denoised.stride(0),
        ),
        constants={
            "SIZES": sizes,
            **dict(zip(("X", "MODEL_OUTPUT", "NOISE", "OUT"), strides, strict=True)),
            "COEFFICIENTS": _vector_strides(vectors),
            "SOURCE": source.value,
            "CHANNELS": channels,
            "ROWS": rows,
            "TILE": tile,
            "VECTOR": vector,
        },
        num_warps=warps,
    )
    return [launch], outputs


def plan_consistency_step_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise_dtype: torch.dtype | None,
) -> tuple[list[Launch], list[Tensor]]:
    """The launch of the gradients and its outputs, still empty; reads no data and needs no GPU."""
    dtypes = [x.dtype, model_output.dtype] + ([] if noise_dtype is None else [noise_dtype])
    outputs = [empty_in_order(x, x.shape, dtype) for dtype in dtypes]
    if not x.numel():
        return [], outputs
    size = math.prod(x.shape[1:])
    inputs = [*grads, *((x, model_output) if low is not None else (None, None))]
    sizes, strides = _merge(_memory_order(x), *inputs, outputs[0])
    tile, warps, vector = _tile(x.numel(), [*outputs, *(t for t in inputs if t is not None)])
    tiles = -(-size // tile)
    launch = Launch(
        kernel=consistency_step_backward_kernel,
        grid=(x.shape[0] * tiles,),
        args=(
            *inputs,
            *(*outputs, None)[:3],
            *_coefficients(vectors, scalars),
            *(low, high),
            *(size, tiles),
            *(0 if t is None else t.stride(0) for t in inputs),
            outputs[0].stride(0),
        ),
        constants={
            "SIZES": sizes,
            **dict(zip(("D_DENOISED", "D_SAMPLE", "D_INPUT", "X", "MODEL_OUTPUT", "OUT"), strides, strict=True)),
            "COEFFICIENTS": _vector_strides(vectors),
            "TILE": tile,
            "VECTOR": vector,
        },
        num_warps=warps,
    )
    return [launch], outputs


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of a sample that have more than one element, outermost in memory first."""
    return sorted((d for d in range(1, x.ndim) if x.shape[d] > 1), key=x.stride, reverse=True)


def _merge(order: Sequence[int], *tensors: Tensor | None) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes of a sample's dimensions in `order`, and strides of each tensor, with neighbours made one where they can.

    Two dimensions become one where, in every tensor, the outer one's step is the inner one's extent.
    """
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    merged: list[tuple[int, list[int]]] = []
    for d in order:
        strides = [t.stride(d) for t in given]
        if merged and all(outer == shape[d] * inner for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * shape[d], strides)
        else:
            merged.append((shape[d], strides))
    merged = merged or [(1, [1] * len(given))]
    # The outermost size is never divided by: it may change without compiling anew.
    sizes = (0, *(size for size, _ in merged[1:]))
    by_tensor = iter([tuple(strides[i] for _, strides in merged) for i in range(len(given))])
    return sizes, [() if t is None else next(by_tensor) for t in tensors]


def _tile(elements: int, tensors: Sequence[Tensor]) -> tuple[int, int, int]:
    """Elements and warps of a program, and how many consecutive elements a lane may hold.

    A program has 16 bytes of the narrowest dtype for each of 64 lanes a warp (CDNA's; NVIDIA's 32 take two vectors). A
    lane holds 16 bytes of the widest dtype: with more, its accesses would be 32 bytes apart and each use half a sector.
    """
    sizes = [t.element_size() for t in tensors]
    warps = 4 if elements >= _MANY_PROGRAMS * 4 * 64 * 16 // min(sizes) else 1
    return warps * 64 * 16 // min(sizes), warps, 16 // max(sizes)


def _coefficients(vectors: Sequence[Tensor | None], scalars: Sequence[float]) -> list[Tensor | float]:
    return [scalar if vector is None else vector for vector, scalar in zip(vectors, scalars, strict=True)]


def _vector_strides(vectors: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if v is None else v.stride(0) for v in vectors)


def _high_word(value: int) -> int:
    return _signed_word(value >> 32)


def _signed_word(value: int) -> int:
    """The low 32 bits as a signed integer, so that every value has the type int32."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value
