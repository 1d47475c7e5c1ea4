"""One step of sampling after the network, as one operator.

    denoised    = clip(a · x + b · model_output)
    sample      = alpha · denoised + beta · z          z given, or counter-based noise
    model_input = input_scale · sample                 the network's next input

Every parameterisation (EDM, consistency, TrigFlow, LCM, TCD, flow) is a choice of the five coefficients:
`cmfast.preconditioning` computes them. Song et al. 2023, "Consistency Models", equation 5 and algorithm 1.

The noise is counter-based: Philox4x32-10 (Salmon et al. 2011) with key (low word of the seed, sample index) and
counter (e div 4, draw, high word of the seed, 0), where e is the element's index in [C, *spatial] order. See
`reference.philox`.
"""

from collections.abc import Sequence
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from . import direct, reference, remembered
from .backends import require, resolve
from .layout import empty_in_order
from .reference.philox import gaussian
from .transforms import (
    apply,
    apply_folded,
    batched,
    differentiates_backward,
    forward_mode,
    needs_definition,
    pullback,
    transformed,
)

Coefficient = float | Tensor

#: A host integer, or one int64 element on x's device, which is read when the kernel runs.
Index = int | Tensor


class ConsistencyStep(NamedTuple):
    """What `consistency_step` returns; fields that were not asked for are None."""

    denoised: Tensor
    sample: Tensor | None
    model_input: Tensor | None


def consistency_step(
    x: Tensor,
    model_output: Tensor,
    a: Coefficient,
    b: Coefficient,
    *,
    clip: float | tuple[float, float] | None = None,
    alpha: Coefficient | None = None,
    beta: Coefficient | None = None,
    noise: Tensor | None = None,
    seed: Index | None = None,
    draw: int = 0,
    first_sample: Index = 0,
    input_scale: Coefficient | None = None,
    backend: str | None = None,
) -> ConsistencyStep:
    """The skip/out parameterisation, the clipping, the renoising and the next input's scale in one launch.

    Args:
        x: [N, C, *spatial], the noisy sample.
        model_output: the network's output, of the shape of x; its floating dtype may differ.
        a: coefficient of x: a Python float, or a float32 tensor [N].
        b: coefficient of model_output, likewise.
        clip: clamp `denoised` to [-clip, clip], or to a pair (low, high).
        alpha: coefficient of `denoised` in `sample`; 1 where only beta is given. `sample` is computed when alpha or
            beta is given.
        beta: coefficient of the noise in `sample`; without it no noise is added.
        noise: z, of the shape of x. Exclusive with seed.
        seed: 0 ≤ seed < 2⁶⁴: z is the counter-based noise of this seed. An integer, or an int64 tensor [] or [1] on the
            device of x, of which a negative value v stands for v + 2⁶⁴. A tensor is read when the kernel runs, without
            a synchronisation: a captured CUDA graph makes the noise of the seed that lies there at its replay.
        draw: 0 ≤ draw < 2³², the number of the draw (0 is a sampler's initial noise).
        first_sample: index of the batch's first sample; sample n of the batch has the noise of index first_sample + n.
            An integer or a tensor, as seed is. The range of a tensor's value is not checked: indices are taken
            modulo 2³².
        input_scale: coefficient of `sample` in `model_input`, which is computed when it is given.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        ConsistencyStep(denoised, sample, model_input), each in the shape and memory format of x; denoised and sample in
        the dtype of x, model_input in that of model_output. Arithmetic is float32 (float64 for float64 x).

    Derivatives:
        A kernel computes the gradients of x, model_output and noise, under torch.func.grad too, and one launch serves
        torch.func.vmap; every element of its batch has the same counter-based noise, unless seed or first_sample is a
        tensor that it maps over. What no kernel computes is the plain-PyTorch definition's, whatever backend is asked
        for: the derivative of the gradients, and value and tangent in forward mode (torch.func.jvp), where coefficients
        have tangents as well. See `cmfast.kernels.transforms`.

    Raises:
        ValueError: shapes, dtypes or combinations of arguments that do not fit, an integer out of its range, or a
            coefficient that requires a gradient.
        BackendError: the backend asked for cannot serve the call; under a transformation of torch.func too.
    """
    low, high = _clip_range(clip)
    rest = (low, high, noise, seed, draw, first_sample)
    found = direct.consistency_step(x, model_output, a, b, alpha, beta, input_scale, *rest, backend)
    if found is not None:
        return ConsistencyStep(*found)
    wants_sample = alpha is not None or beta is not None
    _check(x, model_output, wants_sample, beta, noise, seed, draw, first_sample, input_scale)
    coefficients = (a, b, 1.0 if alpha is None else alpha, 0.0 if beta is None else beta, input_scale)
    if seed is not None and not isinstance(seed, Tensor) and seed >= 1 << 63:
        seed = int(seed) - (1 << 64)  # the schema's integers are signed, and those of numpy have an end
    wants_input = input_scale is not None
    vectors = [_vector(c, x) if isinstance(c, Tensor) else None for c in coefficients]
    scalars = [0.0 if c is None or isinstance(c, Tensor) else float(c) for c in coefficients]
    arguments = (scalars, low, high, noise, seed, draw, first_sample, wants_sample, wants_input)
    outputs: Sequence[Tensor]
    if needs_definition():
        require("consistency_step", _present(x, model_output, noise, *vectors), backend)
        outputs = reference.consistency_step(x, model_output, vectors, *arguments)
    elif transformed() or (
        torch.is_grad_enabled()
        and (x.requires_grad or model_output.requires_grad or (noise is not None and noise.requires_grad))
    ):
        outputs = apply(_ConsistencyStep, x, model_output, *arguments, backend, *vectors)
    elif _is_plain((x, model_output, noise, *vectors), (seed, draw, first_sample)):
        outputs = _serve(x, model_output, vectors, *arguments, backend)
    else:
        outputs = _operator(x, model_output, vectors, *arguments, backend)
    return ConsistencyStep(outputs[0], outputs[1] if wants_sample else None, outputs[2] if wants_input else None)


def _is_plain(tensors: Sequence[Tensor | None], integers: Sequence[Index | None]) -> bool:
    """Whether the dispatcher has nothing to do for a call, nor to refuse in it."""
    if any(type(i) not in (int, Tensor, NoneType) for i in integers):
        return False
    return direct.plain.is_plain((*tensors, *(i for i in integers if isinstance(i, Tensor))))


def _clip_range(clip: float | tuple[float, float] | None) -> tuple[float | None, float | None]:
    if clip is None:
        return None, None
    low, high = clip if isinstance(clip, tuple | list) else (-clip, clip)
    if not low < high:
        raise ValueError(f"consistency_step: clip must be a positive bound or a pair low < high, got {clip!r}")
    return float(low), float(high)


def _check(
    x: Tensor,
    model_output: Tensor,
    wants_sample: bool,
    beta: Coefficient | None,
    noise: Tensor | None,
    seed: Index | None,
    draw: int,
    first_sample: Index,
    input_scale: Coefficient | None,
) -> None:
    if x.ndim < 2 or not x.is_floating_point() or not model_output.is_floating_point():
        raise ValueError(
            "consistency_step: x and model_output must be floating-point tensors [N, C, *spatial], "
            f"got {list(x.shape)} {x.dtype} and {list(model_output.shape)} {model_output.dtype}"
        )
    if model_output.shape != x.shape:
        raise ValueError(
            "consistency_step: model_output must have the shape of x, "
            f"got {list(model_output.shape)} and {list(x.shape)}"
        )
    if noise is not None and (noise.shape != x.shape or not noise.is_floating_point()):
        raise ValueError(
            f"consistency_step: noise must be floating point of shape {list(x.shape)}, got {list(noise.shape)}"
        )
    if noise is not None and seed is not None:
        raise ValueError("consistency_step: give noise or seed, not both")
    if beta is None and (noise is not None or seed is not None):
        raise ValueError("consistency_step: noise or seed was given without beta, the coefficient of the noise")
    if beta is not None and noise is None and seed is None:
        raise ValueError("consistency_step: beta was given without the noise: give noise or seed")
    if input_scale is not None and not wants_sample:
        raise ValueError("consistency_step: input_scale scales the sample: give alpha or beta as well")
    if isinstance(seed, Tensor):
        _check_element("seed", seed, x)
    elif seed is not None and not 0 <= seed < 1 << 64:
        raise ValueError(f"consistency_step: seed must be in [0, 2**64), got {seed}")
    if not 0 <= draw < 1 << 32:
        raise ValueError(f"consistency_step: draw must be in [0, 2**32), got {draw}")
    if isinstance(first_sample, Tensor):
        _check_element("first_sample", first_sample, x)
    elif not 0 <= first_sample <= (1 << 32) - x.shape[0]:
        raise ValueError(f"consistency_step: sample indices must be in [0, 2**32), got first_sample {first_sample}")


def _check_element(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != torch.int64 or value.numel() != 1 or value.ndim > 1 or value.device != x.device:
        raise ValueError(
            f"consistency_step: {name} must be an integer, or an int64 tensor [] or [1] on the device of x "
            f"({x.device}), got {list(value.shape)} {value.dtype} on {value.device}"
        )


def _vector(coefficient: Tensor, x: Tensor) -> Tensor:
    if coefficient.shape != x.shape[:1] or not coefficient.is_floating_point():
        raise ValueError(
            f"consistency_step: a coefficient must be a float or a floating-point tensor [N] = [{x.shape[0]}], "
            f"got {list(coefficient.shape)} {coefficient.dtype}"
        )
    _refuse_gradient(coefficient.requires_grad)
    return coefficient


def _refuse_gradient(of_coefficient: bool) -> None:
    if of_coefficient:
        raise ValueError("consistency_step: coefficients are constants and cannot require a gradient: detach them")


_ARGUMENTS = (
    "Tensor?[] vectors, float[] scalars, float? low, float? high, Tensor? noise, int? seed, SymInt draw, "
    "SymInt first_sample, bool wants_sample, bool wants_input, str? backend, "
    "Tensor? seed_tensor=None, Tensor? first_sample_tensor=None"
)
torch.library.define(
    "cmfast::consistency_step",
    f"(Tensor x, Tensor model_output, {_ARGUMENTS}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "cmfast::consistency_step_backward",
    "(Tensor?[] grads, Tensor x, Tensor model_output, Tensor?[] vectors, float[] scalars, float? low, float? high, "
    "ScalarType? noise_dtype, str? backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _operator(
    x, model_output, vectors, scalars, low, high, noise, seed, draw, first_sample, sample, model_input, backend
):
    """The registered operator, whose schema tells integers from tensors."""
    seed_tensor = first_sample_tensor = None
    if isinstance(seed, Tensor):
        seed, seed_tensor = None, seed
    if isinstance(first_sample, Tensor):
        first_sample, first_sample_tensor = 0, first_sample
    arguments = (x, model_output, vectors, scalars, low, high, noise, seed, draw, first_sample, sample, model_input)
    return torch.ops.cmfast.consistency_step(*arguments, backend, seed_tensor, first_sample_tensor)


@torch.library.impl("cmfast::consistency_step", "default")
def _consistency_step(
    x,
    model_output,
    vectors,
    scalars,
    low,
    high,
    noise,
    seed,
    draw,
    first_sample,
    sample,
    model_input,
    backend,
    seed_tensor=None,
    first_sample_tensor=None,
):
    seed = seed if seed_tensor is None else seed_tensor
    first_sample = first_sample if first_sample_tensor is None else first_sample_tensor
    rest = (draw, first_sample, sample, model_input, backend)
    return _serve(x, model_output, vectors, scalars, low, high, noise, seed, *rest)


def _serve(x, model_output, vectors, scalars, low, high, noise, seed, draw, first_sample, sample, model_input, backend):
    serve = resolve("consistency_step", _present(x, model_output, noise, *vectors), backend)

    def call(*numbers):
        *scalars, at_least, at_most, seed_now, draw, first_now = numbers
        bounds = (None, None) if low is None else (at_least, at_most)
        seeds = seed_now if type(seed) is int else seed, draw, first_now if type(first_sample) is int else first_sample
        return serve(x, model_output, vectors, scalars, *bounds, noise, *seeds, sample, model_input)

    kind = direct.kind_of_step(x, model_output, vectors, low, noise, seed, first_sample, sample, model_input)
    numbers = direct.numbers_of_step(scalars, low, high, seed, draw, first_sample)
    return remembered.serve("consistency_step", backend, kind, call, *numbers, given_anew=True)


@torch.library.impl("cmfast::consistency_step_backward", "default")
def _consistency_step_backward(grads, x, model_output, vectors, scalars, low, high, noise_dtype, backend):
    serve = resolve("consistency_step_backward", _present(x, model_output, *grads, *vectors), backend)
    return serve(grads, x, model_output, vectors, scalars, low, high, noise_dtype)


@torch.library.register_fake("cmfast::consistency_step")
def _consistency_step_fake(
    x, model_output, vectors, scalars, low, high, noise, seed, draw, first_sample, sample, model_input, *_
):
    outputs = [empty_in_order(x, x.shape) for _ in range(2 if sample else 1)]
    return [*outputs, empty_in_order(x, x.shape, model_output.dtype)] if model_input else outputs


@torch.library.register_fake("cmfast::consistency_step_backward")
def _consistency_step_backward_fake(grads, x, model_output, vectors, scalars, low, high, noise_dtype, backend):
    dtypes = [x.dtype, model_output.dtype] + ([] if noise_dtype is None else [noise_dtype])
    return [empty_in_order(x, x.shape, dtype) for dtype in dtypes]


def _present(*tensors: Tensor | None) -> Sequence[Tensor]:
    return [t for t in tensors if t is not None]


class _ConsistencyStep(torch.autograd.Function):
    """Gradients for x, model_output and a given noise; where `denoised` was clipped they are zero."""

    @staticmethod
    def forward(
        x, model_output, scalars, low, high, noise, seed, draw, first_sample, sample, model_input, backend, *vectors
    ):
        rest = (scalars, low, high, noise, seed, draw, first_sample, sample, model_input, backend)
        return tuple(_operator(x, model_output, vectors, *rest))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, model_output, ctx.scalars, ctx.low, ctx.high, noise, _, _, _, _, _, ctx.backend, *vectors = inputs
        _refuse_gradient(any(ctx.needs_input_grad[-5:]))  # of a level below, which the tensor itself did not show
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, model_output, *vectors)

    @staticmethod
    def backward(ctx, *grads):
        x, model_output, *vectors = ctx.saved_tensors
        given = [*grads, None, None][:3]
        if all(grad is None for grad in given):
            return (None,) * 17
        constants = (ctx.scalars, ctx.low, ctx.high, ctx.noise_dtype)
        if forward_mode() or batched(given):
            found = reference.consistency_step_backward(given, x, model_output, vectors, *constants)
        elif differentiates_backward():
            found = _ConsistencyStepBackward.apply(*given, x, model_output, *constants, ctx.backend, *vectors)
        else:
            found = torch.ops.cmfast.consistency_step_backward(given, x, model_output, vectors, *constants, ctx.backend)
        dx, doutput, *dnoise = found
        return dx, doutput, None, None, None, dnoise[0] if dnoise else None, *((None,) * 11)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        operands, dims = list(arguments), list(in_dims)
        if operands[6] is not None:  # the noise of the seed is that of the samples of one element of the batch
            x, seed, draw, first_sample = operands[0], *operands[6:9]
            shape = x.shape if dims[0] is None else x.select(dims[0], 0).shape
            if dims[6] is None and dims[8] is None:
                operands[5], dims[5] = gaussian(shape, seed, draw, first_sample, x.device), None
            else:
                seeds = [seed] * info.batch_size if dims[6] is None else seed.unbind(dims[6])
                firsts = [first_sample] * info.batch_size if dims[8] is None else first_sample.unbind(dims[8])
                noises = [gaussian(shape, s, draw, f, x.device) for s, f in zip(seeds, firsts, strict=True)]
                operands[5], dims[5] = torch.stack(noises), 0
            operands[6] = dims[6] = dims[8] = None
        operands[8] = 0  # without the seed it means nothing
        return apply_folded(_ConsistencyStep, info.batch_size, dims, operands)


class _ConsistencyStepBackward(torch.autograd.Function):
    """The kernel of the backward where it is differentiated in turn: by the definition, linear in the gradients."""

    @staticmethod
    def forward(ddenoised, dsample, dinput, x, model_output, scalars, low, high, noise_dtype, backend, *vectors):
        grads = (ddenoised, dsample, dinput)
        return tuple(
            torch.ops.cmfast.consistency_step_backward(
                grads, x, model_output, vectors, scalars, low, high, noise_dtype, backend
            )
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scalars, ctx.low, ctx.high, ctx.noise_dtype, _ = inputs[:10]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *inputs[10:])

    @staticmethod
    def backward(ctx, *grads):
        *given, x, model_output, a, b, alpha, beta, input_scale = ctx.saved_tensors
        vectors, constants = (a, b, alpha, beta, input_scale), (ctx.scalars, ctx.low, ctx.high, ctx.noise_dtype)
        found = pullback(
            lambda *gs: reference.consistency_step_backward(gs, x, model_output, vectors, *constants),
            given,
            grads,
            ctx.needs_input_grad[:3],
        )
        return *found, *((None,) * 12)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return apply_folded(_ConsistencyStepBackward, info.batch_size, in_dims, arguments)
