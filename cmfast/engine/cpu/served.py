"""The operators that the CPU kernels serve within the engine: how each becomes a step.

Each function is a `lower.Serve`; images lie as the kernels read them (`layouts.fits`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.conv_arguments import ConvArguments
from ...kernels.cpu.attention import launch_attention
from ...kernels.cpu.channel_norm import launch_channel_norm
from ...kernels.cpu.conv import launch_conv2d
from ...kernels.cpu.group_norm import launch_group_norm
from ...kernels.cpu.moments import launch_fold_group_norm, launch_moments
from ...kernels.layout import empty_in_order
from .. import without_data
from ..layouts import fits
from ..lower import Kernels, Serve, copied
from ..steps import Step, Steps

_Values = dict[str, Any]


def _conv2d(steps: Steps, node: fx.Node, given: _Values) -> Any:
    if given["packed"] is None:
        return "its weights were not packed"
    given = _with_rows(steps, node, given)
    if not _dense(given["bias"], given["gain"], given["offset"]):
        return _STRIDED
    out = steps.image(node.meta["val"][0].shape, given["h"].dtype)
    moments = steps.row(out.shape[0], 2, out.shape[1]) if given["moments"] else None
    # Of the weights only the shape is read, and they may be given up: this has no memory.
    weight = torch.zeros((), device="cpu").expand(given["weight"].shape)
    a = ConvArguments(**{name: given[name] for name in ConvArguments._fields})._replace(weight=weight)
    steps.add(Step(node.name, "conv2d", launch_conv2d, (out, moments, a)))
    return out, moments


def _channel_moments(steps: Steps, node: fx.Node, given: _Values) -> Any:
    x = given["x"]
    moments = steps.row(x.shape[0], 2, x.shape[1])
    steps.add(Step(node.name, "channel_moments", launch_moments, (moments, x)))
    return moments


def _fold_group_norm(steps: Steps, node: fx.Node, given: _Values) -> Any:
    given = _with_rows(steps, node, given)
    if not _dense(given["first"], given["second"]) or not _rows(given):
        return _STRIDED
    gain, offset = (steps.row(*part.shape) for part in node.meta["val"])
    arguments = {k: v for k, v in given.items() if k != "backend"}
    steps.add(Step(node.name, "fold_group_norm", _named(launch_fold_group_norm), (gain, offset, arguments)))
    return gain, offset


def _group_norm(steps: Steps, node: fx.Node, given: _Values) -> Any:
    given = _with_rows(steps, node, given)
    if not _rows(given):
        return _STRIDED
    y, mean, rstd = node.meta["val"]
    outs = steps.image(y.shape, given["h"].dtype), steps.row(*mean.shape), steps.row(*rstd.shape)
    arguments = {k: v for k, v in given.items() if k != "backend"}
    steps.add(Step(node.name, "group_norm", _named(launch_group_norm), (*outs, arguments)))
    return outs


def _channel_norm(steps: Steps, node: fx.Node, given: _Values) -> Any:
    given = _with_rows(steps, node, given)
    if not _rows(given):
        return _STRIDED
    x = given["x"]
    rows = torch.empty(x.shape, dtype=x.dtype, device="meta")
    y = steps.image(x.shape, x.dtype) if x.ndim > 2 else steps.keep(rows)
    arguments = {k: v for k, v in given.items() if k != "backend"}
    steps.add(Step(node.name, "channel_norm", _named(launch_channel_norm), (y, arguments)))
    return y


def _timestep_embedding(steps: Steps, node: fx.Node, given: _Values) -> Any:
    """By torch, written in place: the angles lie where the second half of the result will."""
    n, columns = node.meta["val"].shape
    y = steps.row(n, columns)
    halves = y[:, : columns // 2], y[:, columns // 2 :]
    arguments = (*halves, given["t"][:, None], given["frequencies"], given["scale"], given["sin_first"])
    steps.add(Step(node.name, "timestep_embedding", _sinusoids, arguments, "torch's cosines and sines are as fast"))
    return y


def _sinusoids(first: Tensor, second: Tensor, t: Tensor, frequencies: Tensor, scale: float, sin_first: bool) -> None:
    torch.mul(t, frequencies, out=second)
    if scale != 1:
        second.mul_(scale)
    if sin_first:
        torch.sin(second, out=first)
        second.cos_()
    else:
        torch.cos(second, out=first)
        second.sin_()


def _attention(products: torch.dtype, steps: Steps, node: fx.Node, given: _Values) -> Any:
    q = given["q"]
    for name in ("k", "v"):
        if given[name].dtype != q.dtype:
            other = steps.keep(without_data.empty_like(given[name], q.dtype))
            given = given | {name: copied(steps, node, given[name], other, "its dtype is another")}
    out, lse = steps.keep(empty_in_order(q, q.shape)), steps.row(*q.shape[:3])
    arguments = (out, lse, q, given["k"], given["v"], given["scale"], products)
    steps.add(Step(node.name, "attention", launch_attention, arguments))
    return out, lse


def _with_rows(steps: Steps, node: fx.Node, given: _Values) -> _Values:
    """The arguments with rows of float32, as the launchers read them: copies of those that images were made to."""
    for name in ("weight", "bias", "add", "scale", "shift", "gain", "offset"):
        row = given.get(name)
        if isinstance(row, Tensor) and row.is_meta and row.dtype != torch.float32 and steps.owns(row):
            given = given | {name: copied(steps, node, row, steps.row(*row.shape), "its dtype is another")}
    return given


_STRIDED = "a row's elements are not adjacent"


def _dense(*rows: Tensor | None) -> bool:
    return all(x is None or x.is_contiguous() for x in rows)


def _rows(given: _Values) -> bool:
    """Whether the channels of the rows of a group norm are adjacent."""
    rows = (given.get(name) for name in ("weight", "bias", "add", "scale", "shift"))
    return all(x is None or x.shape[-1] == 1 or x.stride(-1) == 1 for x in rows)


def _named(launch: Callable[..., None]) -> Callable[..., None]:
    """The call of a launcher with its outputs in order and the rest in a dict."""
    return lambda *arguments: launch(*arguments[:-1], **arguments[-1])


def kernels(products: torch.dtype, images: torch.dtype | None = None) -> Kernels:
    """What the CPU kernels serve.

    `products` is the dtype of the operands of attention's products; `images` that of values between layers, None for
    the graph's own.
    """
    served: dict[Any, Serve] = {
        torch.ops.cmfast.conv2d.default: _conv2d,
        torch.ops.cmfast.channel_moments.default: _channel_moments,
        torch.ops.cmfast.fold_group_norm.default: _fold_group_norm,
        torch.ops.cmfast.group_norm.default: _group_norm,
        torch.ops.cmfast.channel_norm.default: _channel_norm,
        torch.ops.cmfast.timestep_embedding.default: _timestep_embedding,
        torch.ops.cmfast.attention.default: functools.partial(_attention, products),
    }
    return Kernels(served, fits, "the CPU kernels have no such operator", images)
