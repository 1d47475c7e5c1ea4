"""The operators that the GPU kernels serve within the engine: how each becomes launches.

Each is planned on its arguments, tensors without data: `plan_<operator>` of kernels/triton reads none. What the
launches write becomes buffers: outputs, and scratch between the launches of one operator.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...kernels import triton as kernels_of_triton
from ...kernels.conv_arguments import ConvArguments
from ...kernels.layout import channels_adjoin
from ...kernels.triton.launch import Launch
from ..layouts import fits
from ..lower import Kernels, Serve, copied
from ..steps import Step, Steps

_Values = dict[str, Any]
_ops = torch.ops.cmfast

#: Rows that the kernels read densely; of the others, only a row's elements must be adjacent.
_DENSE = ("weight", "bias", "gain", "offset", "first", "second")
_ROWS = ("add", "scale", "shift")


def kernels(device: torch.device, dtype: torch.dtype, arch: str) -> Kernels:
    """What the GPU kernels serve on a device of this architecture, with images held in `dtype`."""
    served: dict[Any, Serve] = {
        op: functools.partial(_serve, str(op).split(".")[1], device, arch)
        for op in (
            _ops.channel_moments.default,
            _ops.fold_group_norm.default,
            _ops.apply_group_norm.default,
            _ops.group_norm.default,
            _ops.channel_norm.default,
            _ops.timestep_embedding.default,
        )
    }
    served[_ops.conv2d.default] = functools.partial(_conv2d, device, arch)
    served[_ops.attention.default] = functools.partial(_attention, device, arch)
    return Kernels(served, fits, "the GPU kernels have no such operator", dtype)


def available(op: str, device: torch.device, tensors: Sequence[Tensor]) -> tuple[bool, str]:
    """Whether a Triton kernel serves an operator for tensors of these shapes and dtypes on the device, or why not."""
    return kernels_of_triton.available(op, [_stand_in(t, device) for t in tensors])


def _stand_in(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the shape and dtype of t on a device, with the memory of one element."""
    return torch.empty((), dtype=t.dtype, device=device).expand(t.shape)


def _serve(op: str, device: torch.device, arch: str, steps: Steps, node: fx.Node, given: _Values) -> Any:
    names = [a.name for a in node.target._schema.arguments if a.name != "backend"]  # type: ignore[union-attr]
    ok, reason = available(op, device, [given[name] for name in names if isinstance(given[name], Tensor)])
    if not ok:
        return reason
    given = _readable(steps, node, given)
    return _launched(steps, node, op, _plan(op)(*(given[name] for name in names), arch=arch))


def _conv2d(device: torch.device, arch: str, steps: Steps, node: fx.Node, given: _Values) -> Any:
    if given["packed"] is None:
        return available("conv2d", device, [given["h"], given["weight"]])[1] or "its weights were not packed"
    given = _readable(steps, node, given)
    # Of the weights only the shape is read, and they may be given up: this has no memory.
    weight = torch.empty((), device="meta").expand(given["weight"].shape)
    a = ConvArguments(**{name: given[name] for name in ConvArguments._fields})._replace(weight=weight)
    return _launched(steps, node, "conv2d", _plan("conv2d")(a, arch=arch))


def _attention(device: torch.device, arch: str, steps: Steps, node: fx.Node, given: _Values) -> Any:
    q = given["q"]
    for name in ("k", "v"):
        if given[name].dtype != q.dtype:
            out = steps.keep(torch.empty_like(given[name], dtype=q.dtype))
            given = given | {name: copied(steps, node, given[name], out, "its dtype is another")}
    return _serve("attention", device, arch, steps, node, given)


def _plan(op: str) -> Any:
    """The function that plans an operator's launches. It imports triton, which takes a while."""
    module = kernels_of_triton._MODULES[op]
    return getattr(importlib.import_module(f"{kernels_of_triton.__name__}.{module}"), f"plan_{op}")


def _launched(steps: Steps, node: fx.Node, op: str, planned: tuple[Sequence[Launch], Any]) -> Any:
    """Add a step a launch, and memory for all that these write; the operator's results."""
    launches, outputs = planned
    results = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata for t in results}
    for launch in launches:
        for t in launch.args:
            if isinstance(t, Tensor) and t.is_meta and not steps.owns(t):
                scratch = t.untyped_storage()._cdata not in storages
                steps.count(t) if scratch and t.dtype == torch.int32 else steps.keep(t)
        name = op if len(launches) == 1 else f"{op} ({launch.kernel.__name__})"
        steps.add(Step(node.name, name, functools.partial(_launch, launch), launch.args))
    for t in results:
        if not steps.owns(t):  # no launch writes it: it is empty
            steps.keep(t)
    return outputs


def _launch(launch: Launch, *arguments: Any) -> None:
    """Run a launch on other tensors than it was planned with."""
    launch.kernel[launch.grid](*arguments, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages)


def _readable(steps: Steps, node: fx.Node, given: _Values) -> _Values:
    """The arguments with rows that lie as the kernels read them; a plan cannot copy what has no data yet."""
    for name in (*_DENSE, *_ROWS):
        x = given.get(name)
        if not isinstance(x, Tensor) or not x.is_meta:
            continue
        if not (x.is_contiguous() if name in _DENSE else channels_adjoin(x) or math.prod(x.shape) < 2):
            out = steps.keep(torch.empty(x.shape, dtype=x.dtype, device="meta"))
            given = given | {name: copied(steps, node, x, out, "a row's elements are not adjacent")}
    return given
