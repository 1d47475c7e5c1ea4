"""The operators' calls that are checked and timed: their sizes, values, exact results, and peers in plain torch."""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cmfast.kernels import backends, reference, shapes
from torch import Tensor
from torch._functorch import config as functorch
from torch.utils import _pytree as pytree

from tests.kernels.plain import plain_noise, rounded_attention
from tests.kernels.tolerance import assert_as_accurate, error

BACKENDS = ("cuda", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Shape, layout and form of the layer and RMS norms that are checked, everywhere.
CHANNEL_NORMS = (
    ((35, 320), "tokens", "layer affine"),
    ((2, 67, 9, 5), "nhwc", "rms affine film silu"),
    ((1, 40, 7, 9), "nchw", "layer affine"),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is checked, with every dtype, and what is timed.

    A norm is (shapes, layout, form, groups), an attention (n, heads, t, s, d, form), a step (shape, layout), a
    convolution (n, channels, of the second of a pair, columns, size, kernel, form). The norms are also those of given
    moments, which are checked at their first shapes.
    """

    convolutions: tuple = ()
    norms: tuple = ()
    attentions: tuple = ()
    steps: tuple = ()
    timed: tuple[shapes.Call, ...] = ()


def sizes(device) -> Sizes:
    """Two released shapes and an odd one to check, and the released networks' to time; small ones in the dry run."""
    if device.emulated:
        return Sizes(
            convolutions=(
                (2, 24, 0, 20, 4, 3, "affine silu residual moments"),
                (1, 16, 17, 20, 3, 3, "nearest moments"),
                (1, 20, 0, 24, 4, 1, "affine residual moments"),
            ),
            norms=(
                (((1, 32, 6, 6),), "nhwc", "affine silu", 32),
                (((1, 64, 4, 4), (1, 32, 4, 4)), "nhwc", "affine film silu", 32),
                (((2, 35, 3, 5),), "nchw", "affine add silu", 5),
            ),
            attentions=((1, 2, 32, 32, 32, "packed 3hd"), (1, 1, 64, 64, 32, "packed h3d"), (2, 1, 17, 9, 24, "cross")),
            steps=(((2, 3, 8, 8), "nchw"), ((1, 4, 8, 8), "nhwc"), ((3, 3, 3, 5), "nchw")),
            timed=(
                shapes.conv_call(1, 24, 0, 20, 4, 3, torch.bfloat16, "affine silu average residual moments"),
                shapes.norm_call(((1, 64, 8, 8),), "nhwc", torch.bfloat16, "affine silu"),
                shapes.norm_gradient_call(((1, 32, 4, 4),), "nhwc", torch.bfloat16, "affine silu"),
                shapes.moments_call((1, 32, 4, 4), "nhwc", torch.bfloat16),
                shapes.fold_call(((1, 32, 4, 4),), torch.bfloat16, "affine film"),
                shapes.applied_norm_call(((1, 32, 4, 4),), "nhwc", torch.bfloat16, "affine silu average"),
                shapes.attention_call(1, 2, 32, 32, 32, torch.bfloat16, "packed 3hd"),
                shapes.attention_gradient_call(1, 1, 32, 32, 32, torch.bfloat16, "packed 3hd"),
                shapes.step_call((1, 3, 8, 8), "nchw", torch.float32, True),
            ),
        )
    return Sizes(
        convolutions=(
            (2, 192, 0, 192, 64, 3, "affine silu residual moments"),
            (1, 384, 192, 384, 32, 3, "affine silu moments"),
            (1, 384, 0, 384, 16, 3, "nearest residual moments"),
            (3, 35, 21, 50, 7, 3, "affine silu average residual moments"),
            (2, 576, 0, 100, 9, 1, "affine residual moments"),
        ),
        norms=(
            (((1, 192, 64, 64),), "nhwc", "affine silu", 32),
            (((1, 768, 16, 16), (1, 576, 16, 16)), "nhwc", "affine film silu", 32),
            (((3, 35, 7, 9),), "nchw", "affine add silu", 5),
        ),
        attentions=(
            (1, 6, 1024, 1024, 64, "packed 3hd"),
            (1, 9, 256, 256, 64, "packed h3d"),
            (2, 3, 65, 77, 40, "cross"),
        ),
        steps=(((16, 3, 64, 64), "nchw"), ((1, 3, 256, 256), "nhwc"), ((3, 3, 7, 5), "nchw")),
        timed=tuple(_timed()),
    )


def _timed() -> Iterator[shapes.Call]:
    """The most telling first: batch 1 in bfloat16 of every operator, a video decoder's norms, batch 16, the rest.

    Of these the convolutions are the larger part of a network's time: six of them, then each operator in turn.
    """
    known = list(shapes.calls())
    first = [
        call for call in known if call.dtype == "bfloat16" and call.shape.startswith("1x") and "nchw" not in call.layout
    ]
    convolutions, others = ([c for c in first if (c.op == "conv2d") == kind] for kind in (True, False))
    by_operator = [[c for c in others if c.op == op] for op in dict.fromkeys(c.op for c in others)]
    turns = itertools.zip_longest(*by_operator, convolutions[6:])
    first = [*convolutions[:6], *(call for turn in turns for call in turn if call is not None)]
    yield from first
    for shape in ((1, 128, 17, 480, 848), (1, 512, 17, 60, 106)):
        yield shapes.norm_call((shape,), "nhwc", torch.bfloat16, "affine silu")
    norms = (
        (((16, 384, 32, 32),), "affine film silu"),
        (((16, 576, 16, 16),), "affine"),
        (((16, 768, 8, 8),), "affine film silu"),
        (((16, 192, 64, 64), (16, 192, 64, 64)), "affine silu"),
    )
    for norm, form in norms:
        yield shapes.norm_call(norm, "nhwc", torch.bfloat16, form)
    for heads, tokens in ((9, 256), (12, 64)):
        yield shapes.attention_call(16, heads, tokens, tokens, 64, torch.bfloat16, "packed 3hd")
    yield shapes.attention_gradient_call(16, 6, 1024, 1024, 64, torch.bfloat16, "packed 3hd")
    done = {name(call) for call in first}
    yield from (call for call in known if name(call) not in done)


def checked(device) -> Iterator[shapes.Call]:
    """Every operator with every dtype, forward and backward, then what is timed (without the video decoder's)."""
    found = sizes(device)
    for dtype in DTYPES:
        for *numbers, form in found.convolutions:
            yield shapes.conv_call(*numbers, dtype, form)
        for norm, layout, form, groups in found.norms:
            yield shapes.moments_call(norm[0], layout, dtype)
            yield shapes.fold_call(norm, dtype, form.removesuffix(" silu"), groups)
            yield shapes.applied_norm_call(norm, layout, dtype, form + " average", groups)
            yield shapes.norm_call(norm, layout, dtype, form, groups)
            yield shapes.norm_gradient_call(norm, layout, dtype, form, groups)
        for shape, layout, form in CHANNEL_NORMS:
            yield shapes.channel_norm_call(shape, layout, dtype, form)
        for *numbers, form in found.attentions:
            yield shapes.attention_call(*numbers, dtype, form)
            yield shapes.attention_gradient_call(*numbers, dtype, form)
        for shape, layout in found.steps:
            yield shapes.step_call(shape, layout, dtype, True)
            yield shapes.step_gradient_call(shape, layout, dtype)
    yield from (shapes.timesteps_call(*numbers) for numbers in ((1, 96), (3, 35)))
    yield from (call for call in found.timed if len(call.shape.split("x")) < 5 or " " in call.shape)


def backends_of(call: shapes.Call) -> list[str]:
    """The backends that have a kernel for the call."""
    modules = {name: importlib.import_module(f"cmfast.kernels.{name}") for name in BACKENDS}
    has = [name for name, module in modules.items() if hasattr(module, call.op)]
    return [name for name in has if name != "cuda" or modules[name].serves(call.op, call.arguments)[0]]


def name(call: shapes.Call) -> str:
    """What tells the call from the others."""
    return f"{call.op} {call.shape} {call.layout} {call.form} {call.dtype}"


def fields(call: shapes.Call) -> dict[str, str]:
    """The same as columns of a row."""
    return {key: getattr(call, key) for key in ("op", "shape", "layout", "form", "dtype")}


def values(call: shapes.Call, device, seed: int = 0) -> tuple:
    """The call's arguments with normal values; what a backward gets of its forward is the definition's.

    Weights of a convolution are normal by the square root of its inputs, and packed here. Moments are those of normal
    values, where the call has none to take them of.
    """
    generator = torch.Generator(device.name).manual_seed(seed)

    def real(tensor: Tensor) -> Tensor:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        numbers = torch.randn(size, generator=generator, device=device.name).to(tensor.dtype)
        return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    found = pytree.tree_map_only(Tensor, real, call.arguments)
    if call.op == "group_norm_backward":
        _, h, skip, groups, weight, bias, add, scale, shift, silu, *_ = found
        found = (*found[:10], *reference.group_norm(h, skip, groups, weight, bias, 1e-5, add, scale, shift, silu)[1:])
    if call.op == "attention_backward":
        grad, q, k, v, _, _, factor = found
        found = (grad, q, k, v, *reference.attention(q, k, v, factor), factor)
    if call.op == "conv2d":
        from cmfast.kernels.conv_weights import pack

        (a,) = found
        weight = a.weight / a.weight[0].numel() ** 0.5
        found = (a._replace(weight=weight, packed=pack(weight, a.dtype)),)
    if call.op == "apply_group_norm":
        h, skip, *_ = found
        found = (h, skip, *(None if x is None else reference.channel_moments(x) for x in (h, skip)), *found[4:])
    if call.op == "timestep_embedding":
        found[0].mul_(300)
    if call.op == "fold_group_norm":
        for moments in tensors(found[:2]):
            moments[:, 1].square_().add_(0.5).mul_(found[2])
    return found


def tensors(given: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]


def bytes_moved(call: shapes.Call, given: tuple) -> int:
    """The fewest bytes: each input is read once (of weights, the packed ones), each output written once."""
    if call.op == "conv2d":
        given = (given[0]._replace(packed=None),)
    meta = tensors(getattr(reference, call.op)(*call.arguments)) if call.op != "consistency_step" else None
    if meta is None:  # its noise is drawn with a device's generator: the outputs are like the first input
        x, wanted = call.arguments[0], 1 + sum(call.arguments[-2:])
        return (2 + wanted) * x.numel() * x.element_size()
    return sum(t.numel() * t.element_size() for t in (*tensors(given), *meta))


def served(call: shapes.Call, backend: str, given: tuple) -> Callable[[], Any]:
    """The call on the backend that is named, or BackendError; no other serves it."""
    function = backends.resolve(call.op, tensors(given), backend, given)
    if not function.__module__.startswith(f"cmfast.kernels.{backend}"):
        raise backends.BackendError(f"asked for {backend}, and {function.__module__} serves {call.op}")
    return lambda: function(*given)


def launched(call: shapes.Call, backend: str, given: tuple) -> Callable[[], Any]:
    """`served`, by launches planned once where they count: their counters are cleared once, as in the engine."""
    run = served(call, backend, given)
    plans = {"conv2d": "conv", "channel_moments": "moments"}
    if backend != "triton" or call.op not in plans:
        return run
    module = importlib.import_module(f"cmfast.kernels.triton.{plans[call.op]}")
    launches, results = getattr(module, f"plan_{call.op}")(*given)

    def launch():
        for each in launches:
            each.run()
        return results

    return launch


def judge(call: shapes.Call, given: tuple, actual: Any, device) -> float:
    """The largest error of a result, as a share of the largest exact value.

    Raises AssertionError, which says where, if it is more than twice that of plain PyTorch at the same precision.
    """
    if call.op == "group_norm" and given[0].numel() > 1 << 28:
        given, actual = _some_groups(given, actual)
    definition = getattr(reference, call.op)
    exact = outputs(call, definition(*wide(given)))
    plain = _plain(call, given)
    # What is small may be right by luck: other values of the same call count as well.
    others = values(call, device, seed=1) if exact[0].numel() < 1 << 24 else None
    elsewhere = [0.0] * len(exact)
    if others is not None:
        pairs = zip(_plain(call, others), outputs(call, definition(*wide(others))), strict=True)
        elsewhere = [max(error(way, e) for way in ways) for ways, e in pairs]
    found = []
    scales = _scales(call, given, exact)
    for i, (a, e) in enumerate(zip(outputs(call, actual), exact, strict=True)):
        sums = 5e-7 * scales[i] if a.dtype == torch.float32 else 0.0  # in another order
        worst = max(plain[i], key=lambda way, e=e: error(way, e))
        assert_as_accurate(f"output {i}", a, e, worst, max(elsewhere[i], sums))
        found.append(error(a, e) / max(e.abs().max().item(), 1e-30))
    return max(found)


def outputs(call: shapes.Call, results: Any) -> list[Tensor]:
    """The results, of which moments are two: means, and sums of squared deviations, which are much larger."""
    found = tensors(results)
    if call.op == "channel_moments":
        return [*found[0].unbind(1)]
    if call.op == "conv2d":
        return [found[0], *(found[1].unbind(1) if found[1].numel() else ())]
    return found


def _scales(call: shapes.Call, given: tuple, exact: Sequence[Tensor]) -> list[float]:
    """The values whose rounding in sums of another order each output may show.

    Moments are sums of values less one of them, which lies some standard deviations from their mean.
    """
    found = [e.abs().max().item() for e in exact]
    if call.op == "channel_moments" or (call.op == "conv2d" and len(exact) > 1):
        image = exact[0] if call.op == "conv2d" else given[0]
        deviations = found[-1]
        found[-2:] = [4 * (deviations / image[0, 0].numel()) ** 0.5, 4 * deviations]
    return found


def _some_groups(given: tuple, actual: tuple, share: int = 8) -> tuple[tuple, tuple]:
    """The first groups of a group norm without FiLM: float64 copies of a video would not fit into the memory."""
    h, skip, groups, weight, bias, eps, *rest = given
    assert skip is None
    assert not any(isinstance(x, Tensor) for x in rest)
    c = h.shape[1] // share
    y, mean, rstd = actual
    some = groups // share
    return (h[:, :c], None, some, weight[:c], bias[:c], eps, *rest), (y[:, :c], mean[:, :some], rstd[:, :some])


def wide(given: tuple) -> tuple:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)


def _plain(call: shapes.Call, given: tuple) -> list[tuple[Tensor, ...]]:
    """Each output in plain PyTorch at the precision of the arguments, in one way or two."""
    if call.op == "attention":
        q, k, v, factor = given
        ways = [rounded_attention(q, k, v, factor, scale_first=first) for first in (False, True)]
    elif call.op == "attention_backward":
        grad, q, k, v, _, _, factor = given
        ways = [rounded_attention(q, k, v, factor, grad, first) for first in (False, True)]
    else:
        if call.op == "consistency_step" and given[7] is not None:
            x, *_ = given
            noise = plain_noise(x.shape, given[7], *given[8:10]).to(x.device)
            given = (*given[:6], noise, None, *given[8:])
        ways = [getattr(reference, call.op)(*given)]
    return list(zip(*(outputs(call, way) for way in ways), strict=True))


def in_torch(call: shapes.Call, given: tuple, compiled: Callable | None = None) -> Callable[[], Any]:
    """What a network in plain torch would run, gradients by autograd; `compiled` is what `compile_call` made of it."""
    forward, inputs, grads = _in_torch(call, given)
    forward = compiled or forward
    if grads is None:
        return lambda: forward(*inputs)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    wanted = [x for x in leaves if isinstance(x, Tensor)]
    outputs = forward(*leaves)
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def compile_call(call: shapes.Call, given: tuple) -> Callable:
    """What torch.compile makes of the call in plain torch, for any values of these shapes."""
    functorch.donated_buffer = False  # a backward that runs more than once keeps its buffers
    return torch.compile(_in_torch(call, given)[0], dynamic=False)


def _in_torch(call: shapes.Call, given: tuple) -> tuple[Callable, tuple, Any]:
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


def _convolution(a) -> tuple[Callable, tuple, None]:
    """The convolution by cuDNN with what surrounds it, all in the image's dtype and channels last."""

    def rows(value):
        return None if value is None else value.to(a.h.dtype)[..., None, None]

    def convolution(h, skip, weight, bias, gain, offset, residual):
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


def _norm(groups: int, eps: float, silu: bool, resample: str | None = None) -> Callable:
    def norm(h, skip, weight, bias, add, scale, shift):
        x = h if skip is None else torch.cat((h, skip), 1)

        def rows(value):
            return value.reshape(*value.shape, *(1,) * (x.ndim - 2))

        x = x if add is None else x + rows(add)
        y = F.group_norm(x, groups, weight, bias, eps)
        y = y if scale is None else y * (1 + rows(scale)) + rows(shift)
        return _resampled(F.silu(y) if silu else y, resample)

    return norm


def _channel_norm(x, weight, bias, eps, centred, least, scale, shift, silu):
    tokens = x.movedim(1, -1)
    norm = functools.partial(F.layer_norm, bias=bias) if centred else F.rms_norm
    y = norm(tokens, tokens.shape[-1:], weight=weight, eps=eps)
    y = y if centred or bias is None else y + bias

    def rows(value):
        return value.reshape(len(value), *(1,) * (x.ndim - 2), -1)

    y = y if scale is None else y * (1 + rows(scale)) + rows(shift)
    return (F.silu(y) if silu else y).movedim(-1, 1)


def _step(scalars, low, high, wants_sample: bool, wants_input: bool, noise: Callable | None) -> Callable:
    a, b, alpha, beta, input_scale = scalars

    def step(x, output):
        denoised = (a * x + b * output).clamp(low, high)
        if not wants_sample:
            return denoised
        sample = alpha * denoised if noise is None else alpha * denoised + beta * noise(x)
        return (denoised, sample, input_scale * sample) if wants_input else (denoised, sample)

    return step
