"""The operators' calls that are checked and timed: their sizes, values, exact results, and peers in plain torch."""

import dataclasses
from collections.abc import Callable, Iterator
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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is checked, with every dtype, and what is timed.

    A norm is (shapes, layout, form, groups), an attention (n, heads, t, s, d, form), a step (shape, layout).
    """

    norms: tuple = ()
    attentions: tuple = ()
    steps: tuple = ()
    timed: tuple[shapes.Call, ...] = ()


def sizes(device) -> Sizes:
    """Two released shapes and an odd one to check, and the released networks' to time; small ones in the dry run."""
    if device.emulated:
        return Sizes(
            norms=(
                (((1, 32, 6, 6),), "nhwc", "affine silu", 32),
                (((1, 64, 4, 4), (1, 32, 4, 4)), "nhwc", "affine film silu", 32),
                (((2, 35, 3, 5),), "nchw", "affine add silu", 5),
            ),
            attentions=((1, 2, 32, 32, 32, "packed 3hd"), (1, 1, 64, 64, 32, "packed h3d"), (2, 1, 17, 9, 24, "cross")),
            steps=(((2, 3, 8, 8), "nchw"), ((1, 4, 8, 8), "nhwc"), ((3, 3, 3, 5), "nchw")),
            timed=(
                shapes.norm_call(((1, 64, 8, 8),), "nhwc", torch.bfloat16, "affine silu"),
                shapes.norm_gradient_call(((1, 32, 4, 4),), "nhwc", torch.bfloat16, "affine silu"),
                shapes.attention_call(1, 2, 32, 32, 32, torch.bfloat16, "packed 3hd"),
                shapes.attention_gradient_call(1, 1, 32, 32, 32, torch.bfloat16, "packed 3hd"),
                shapes.step_call((1, 3, 8, 8), "nchw", torch.float32, True),
            ),
        )
    return Sizes(
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
    """The most telling first: batch 1 in bfloat16 of every operator, a video decoder's norms, batch 16, the rest."""
    known = list(shapes.calls())
    first = [
        call for call in known if call.dtype == "bfloat16" and call.shape.startswith("1x") and "nchw" not in call.layout
    ]
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
        for norm, layout, form, groups in found.norms:
            yield shapes.norm_call(norm, layout, dtype, form, groups)
            yield shapes.norm_gradient_call(norm, layout, dtype, form, groups)
        for *numbers, form in found.attentions:
            yield shapes.attention_call(*numbers, dtype, form)
            yield shapes.attention_gradient_call(*numbers, dtype, form)
        for shape, layout in found.steps:
            yield shapes.step_call(shape, layout, dtype, True)
            yield shapes.step_gradient_call(shape, layout, dtype)
    yield from (call for call in found.timed if len(call.shape.split("x")) < 5 or " " in call.shape)


def name(call: shapes.Call) -> str:
    """What tells the call from the others."""
    return f"{call.op} {call.shape} {call.layout} {call.form} {call.dtype}"


def fields(call: shapes.Call) -> dict[str, str]:
    """The same as columns of a row."""
    return {key: getattr(call, key) for key in ("op", "shape", "layout", "form", "dtype")}


def values(call: shapes.Call, device, seed: int = 0) -> tuple:
    """The call's arguments with normal values; what a backward gets of its forward is the definition's."""
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
    return found


def tensors(given: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]


def bytes_moved(call: shapes.Call, given: tuple) -> int:
    """The fewest bytes: each input is read once, each output written once."""
    meta = tensors(getattr(reference, call.op)(*call.arguments)) if call.op != "consistency_step" else None
    if meta is None:  # its noise is drawn with a device's generator: the outputs are like the first input
        x, wanted = call.arguments[0], 1 + sum(call.arguments[-2:])
        return (2 + wanted) * x.numel() * x.element_size()
    return sum(t.numel() * t.element_size() for t in (*tensors(given), *meta))


def served(call: shapes.Call, backend: str, given: tuple) -> Callable[[], Any]:
    """The call on the backend that is named, or BackendError; no other serves it."""
    function = backends.resolve(call.op, tensors(given), backend)
    if not function.__module__.startswith(f"cmfast.kernels.{backend}"):
        raise backends.BackendError(f"asked for {backend}, and {function.__module__} serves {call.op}")
    return lambda: function(*given)


def judge(call: shapes.Call, given: tuple, actual: Any, device) -> float:
    """The largest error of a result, as a share of the largest exact value.

    Raises AssertionError, which says where, if it is more than twice that of plain PyTorch at the same precision.
    """
    if call.op == "group_norm" and given[0].numel() > 1 << 28:
        given, actual = _some_groups(given, actual)
    definition = getattr(reference, call.op)
    exact = tensors(definition(*wide(given)))
    plain = _plain(call, given)
    # What is small may be right by luck: other values of the same call count as well.
    others = values(call, device, seed=1) if exact[0].numel() < 1 << 24 else None
    elsewhere = [0.0] * len(exact)
    if others is not None:
        pairs = zip(_plain(call, others), tensors(definition(*wide(others))), strict=True)
        elsewhere = [max(error(way, e) for way in ways) for ways, e in pairs]
    found = []
    for i, (a, e) in enumerate(zip(tensors(actual), exact, strict=True)):
        sums = 5e-7 * e.abs().max().item() if a.dtype == torch.float32 else 0.0  # in another order
        worst = max(plain[i], key=lambda way, e=e: error(way, e))
        assert_as_accurate(f"output {i}", a, e, worst, max(elsewhere[i], sums))
        found.append(error(a, e) / max(e.abs().max().item(), 1e-30))
    return max(found)


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
    return list(zip(*map(tensors, ways), strict=True))


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
    """A function of torch's operators, its arguments, and the gradients of its outputs for a backward."""
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


def _norm(groups: int, eps: float, silu: bool) -> Callable:
    def norm(h, skip, weight, bias, add, scale, shift):
        x = h if skip is None else torch.cat((h, skip), 1)

        def rows(value):
            return value.reshape(*value.shape, *(1,) * (x.ndim - 2))

        x = x if add is None else x + rows(add)
        y = F.group_norm(x, groups, weight, bias, eps)
        y = y if scale is None else y * (1 + rows(scale)) + rows(shift)
        return F.silu(y) if silu else y

    return norm


def _step(scalars, low, high, wants_sample: bool, wants_input: bool, noise: Callable | None) -> Callable:
    a, b, alpha, beta, input_scale = scalars

    def step(x, output):
        denoised = (a * x + b * output).clamp(low, high)
        if not wants_sample:
            return denoised
        sample = alpha * denoised if noise is None else alpha * denoised + beta * noise(x)
        return (denoised, sample, input_scale * sample) if wants_input else (denoised, sample)

    return step
