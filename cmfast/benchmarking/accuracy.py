"""When a result is right: against float64, at most twice the error of the plain formula at the same precision."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels import reference
from ..kernels.conv_arguments import ConvArguments
from ..kernels.reference.philox import philox4x32
from ..kernels.shapes import Call
from .calls import tensors, values

#: Elements above which a group norm is compared by its first groups.
LARGE = 1 << 28
#: Relative errors of the norm above which a result is not that of the same function.
WRONG = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
#: The same of a convolution by Winograd's form, by the dtype of its products and its tile.
WRONG_WINOGRAD = {(torch.float32, 2): 1e-5, (torch.float32, 4): 2e-5, (torch.bfloat16, 2): 1e-2}
WRONG_WINOGRAD[torch.bfloat16, 4] = 3e-2


class WrongResultError(AssertionError):
    """A result that is not right; the message says where and by how much."""


def error(plain: Tensor, exact: Tensor) -> float:
    """The largest error of `plain`."""
    return (plain.double() - exact).abs().max().item() if plain.numel() else 0.0


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact result."""
    if result.shape != exact.shape:
        raise WrongResultError(f"shape {list(result.shape)}, expected {list(exact.shape)}")
    return ((result.double() - exact).norm() / exact.norm()).item()


def assert_as_accurate(name: str, actual: Tensor, exact: Tensor, plain: Tensor, others: float = 0.0) -> None:
    """Compare `actual` with the float64 answer `exact`, given what plain PyTorch makes of the same inputs.

    The error allowed is twice the largest of `plain`, plus one unit of rounding of each element. Where a tensor is so
    small that `plain` may be right by luck, `others` is the largest error of plain PyTorch on inputs like these.

    Raises:
        WrongResultError: the shape, the dtype or a value is wrong.
    """
    if actual.shape != exact.shape:
        raise WrongResultError(f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    if actual.dtype != plain.dtype:
        raise WrongResultError(f"{name}: {actual.dtype}, expected {plain.dtype}")
    if not torch.isfinite(actual).all():
        raise WrongResultError(f"{name}: not finite")
    if not actual.numel():
        return
    allowed = 2.0 * max(error(plain, exact), others) + torch.finfo(actual.dtype).eps * exact.abs()
    excess = (actual.double() - exact).abs() - allowed
    worst = excess.argmax()
    if excess.max() > 0:
        raise WrongResultError(
            f"{name}: off by {(actual.double() - exact).abs().flatten()[worst]:.3g} at {worst.item()}, "
            f"allowed {allowed.flatten()[worst]:.3g}"
        )


def judge(call: Call, given: tuple[Any, ...], actual: Any) -> float:
    """The largest error of a backend's result, as a share of the largest exact value.

    Raises:
        WrongResultError: it is more than twice that of plain PyTorch at the same precision; of a convolution in
            Winograd's form, whose sums are others, more than WRONG_WINOGRAD of the norm.
    """
    if call.op == "group_norm" and given[0].numel() > LARGE:
        given, actual = _some_groups(given, actual)
    definition = getattr(reference, call.op)
    exact = outputs(call, definition(*wide(given)))
    if call.op == "conv2d" and given[0].tile > 1:
        return _judge_winograd(given[0], outputs(call, actual), exact)
    plain = _plain(call, given)
    # What is small may be right by luck: other values of the same call count as well.
    others = values(call, exact[0].device.type, seed=1) if exact[0].numel() < 1 << 24 else None
    elsewhere = [0.0] * len(exact)
    if others is not None:
        pairs = zip(_plain(call, others), outputs(call, definition(*wide(others))), strict=True)
        elsewhere = [max(error(way, e) for way in ways) for ways, e in pairs]
    found = []
    scales = _scales(call, given, exact)
    for i, (a, e) in enumerate(zip(outputs(call, actual), exact, strict=True)):
        sums = 5e-7 * scales[i] if a.dtype == torch.float32 else 0.0  # in another order
        worst = max(plain[i], key=lambda way, e=e: error(way, e))  # type: ignore[misc]
        assert_as_accurate(f"output {i}", a, e, worst, max(elsewhere[i], sums))
        found.append(error(a, e) / max(e.abs().max().item(), 1e-30))
    return max(found)


def judge_plain(call: Call, given: tuple[Any, ...], actual: Any) -> float:
    """The relative error of what plain torch makes of a call (`plain_torch`), of the norm.

    Where its outputs are others (gradients of all parameters, another noise, a clip that rounding moves), they must be
    finite, and 0 is returned.

    Raises:
        WrongResultError: it is above WRONG, or not finite.
    """
    if not all(torch.isfinite(t).all() for t in tensors(actual)):
        raise WrongResultError("not finite")
    if call.op.endswith("_backward") or call.op == "consistency_step":
        return 0.0
    exact = tensors(getattr(reference, call.op)(*wide(given)))[0]
    off = relative_error(tensors(actual)[0], exact)
    if not off < WRONG[call.dtype]:
        raise WrongResultError(f"off by {off:.2g} of the norm, allowed {WRONG[call.dtype]:.2g}")
    return off


def check_alike(actual: Any, expected: Any) -> None:
    """The outputs of two ways to one kernel are the same bits; what is empty was not made.

    Raises:
        WrongResultError: they are not.
    """
    for i, (a, e) in enumerate(zip(tensors(actual), tensors(expected), strict=True)):
        if a.numel() and not torch.equal(a, e):
            raise WrongResultError(f"output {i}: the short way gives other values than the long one")


def outputs(call: Call, results: Any) -> list[Tensor]:
    """The results, of which moments are two: means, and sums of squared deviations, which are much larger."""
    found = tensors(results)
    if call.op == "channel_moments":
        return [*found[0].unbind(1)]
    if call.op == "conv2d":
        return [found[0], *(found[1].unbind(1) if found[1].numel() else ())]
    return found


def wide(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)


def rounded_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor | None = None, scale_first: bool = False
) -> tuple[Tensor, ...]:
    """The definition at the precision of q: sums in float32, the operands of its products in the dtype of q.

    So p and the gradient of the scores are rounded to 16 bits before they meet operands of 16 bits, as the tensor cores
    of any fused attention need it. Returns out and lse, or dq, dk and dv where grad is given.
    """
    q_, k_, v_ = (x.float() for x in (q, k, v))
    scores = (q_ * scale) @ k_.mT if scale_first else q_ @ k_.mT * scale
    lse = scores.logsumexp(3)
    p = torch.exp(scores - lse[..., None])
    narrow = p.to(q.dtype).float()
    out = (narrow @ v_).to(q.dtype)
    if grad is None:
        return out, lse
    grad = grad.float()
    dscores = p * (grad @ v_.mT - (grad * out.float()).sum(3, keepdim=True))
    dscores = dscores.to(q.dtype).float()
    return tuple(x.to(q.dtype) for x in (dscores @ k_ * scale, dscores.mT @ q_ * scale, narrow.mT @ grad))


def plain_noise(shape: Sequence[int], seed: int, draw: int, first_sample: int) -> Tensor:
    """The counter-based noise by the same formula in float32."""
    size = math.prod(shape[1:])
    block, sample = torch.arange(-(-size // 4)), torch.arange(shape[0])[:, None] + first_sample
    word = [torch.tensor(v & 0xFFFFFFFF) for v in (draw, seed >> 32, seed)]
    r = philox4x32((block, word[0], word[1], torch.tensor(0)), (word[2], sample))
    u = [(2 * (w >> 9) + 1).float() * 2.0**-24 for w in r]
    z = [torch.sqrt(-2 * torch.log(u[i])) * f(2 * math.pi * u[i + 1]) for i in (0, 2) for f in (torch.cos, torch.sin)]
    return torch.stack(z, -1).reshape(shape[0], -1)[:, :size].reshape(*shape)


def _judge_winograd(a: ConvArguments, actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    allowed = WRONG_WINOGRAD[a.dtype, a.tile] + torch.finfo(a.h.dtype).eps
    found = []
    for i, (result, e) in enumerate(zip(actual, exact, strict=True)):
        # A mean over an image is the sum of values that mostly cancel.
        scale = (exact[2] / exact[0][0, 0].numel()).sqrt().norm() if i == 1 else e.norm()
        off = ((result.double() - e).norm() / scale).item()
        if not off < allowed:
            raise WrongResultError(f"output {i}: off by {off:.2g} of the norm, allowed {allowed:.2g}")
        found.append(off)
    return max(found)


def _scales(call: Call, given: tuple[Any, ...], exact: Sequence[Tensor]) -> list[float]:
    """The values whose rounding in sums of another order each output may show.

    Moments are sums of values less one of them, which lies some standard deviations from their mean, and a group's mean
    is a sum of values that mostly cancel: the operators' tests allow as much.
    """
    found = [e.abs().max().item() for e in exact]
    if call.op == "group_norm":
        found[1] = 4 / exact[2].min().item()
    if call.op == "channel_moments" or (call.op == "conv2d" and len(exact) > 1):
        image = exact[0] if call.op == "conv2d" else given[0]
        deviations = found[-1]
        found[-2:] = [4 * (deviations / image[0, 0].numel()) ** 0.5, 20 * deviations]
    return found


def _some_groups(given: tuple[Any, ...], actual: Any, share: int = 8) -> tuple[tuple[Any, ...], Any]:
    """The first groups of a group norm of one input: float64 copies of a video would not fit into the memory."""
    h, skip, groups, weight, bias, eps, *rest = given
    assert skip is None
    c = h.shape[1] // share
    rest = [x[:, :c] if isinstance(x, Tensor) else x for x in rest]
    y, mean, rstd = actual
    some = groups // share
    return (h[:, :c], None, some, weight[:c], bias[:c], eps, *rest), (y[:, :c], mean[:, :some], rstd[:, :some])


def _plain(call: Call, given: tuple[Any, ...]) -> list[tuple[Tensor, ...]]:
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
