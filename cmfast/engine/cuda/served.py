"""The operators that the GPU kernels serve within the engine: how each becomes steps.

By default they are Triton's, or csrc/cuda's where they were measured to be faster. Where a backend is asked for by
name, it serves all of them, or says which it cannot.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.backends import BackendError
from ...kernels.layout import channels_adjoin
from .. import without_data
from ..graph import CONV
from ..layouts import fits
from ..lower import Kernels, Serve, copied
from ..steps import Steps
from .convolutions import Convolutions
from .forms import Choose, Form
from .launches import available
from .operators import OF_CUDA, lower_operator

_Values = dict[str, Any]
_ops = torch.ops.cmfast

#: Rows that the kernels read densely; of the others, only a row's elements must be adjacent.
_DENSE = ("weight", "bias", "gain", "offset", "first", "second")
_ROWS = ("add", "scale", "shift")


def kernels(
    device: torch.device, dtype: torch.dtype, arch: str, convolutions: Convolutions, backend: str = "auto"
) -> Kernels:
    """What the GPU kernels serve on a device of this architecture, with images held in `dtype`.

    `backend` is "cuda" or "triton", or "auto", with which torch serves what the kernels cannot.
    """
    how = (device, arch, convolutions.choose, backend)
    served: dict[Any, Serve] = {
        op: functools.partial(_serve, str(op).split(".")[1], *how)
        for op in (
            _ops.channel_moments.default,
            _ops.fold_group_norm.default,
            _ops.apply_group_norm.default,
            _ops.group_norm.default,
            _ops.channel_norm.default,
            _ops.timestep_embedding.default,
        )
    }
    served[CONV] = functools.partial(_conv2d, convolutions, backend)
    served[_ops.attention.default] = functools.partial(_attention, *how)
    return Kernels(served, fits, "the GPU kernels have no such operator", dtype)


def _serve(
    op: str, device: torch.device, arch: str, choose: Choose, backend: str, steps: Steps, node: fx.Node, given: _Values
) -> Any:
    names = [a.name for a in node.target._schema.arguments if a.name != "backend"]  # type: ignore[union-attr]
    tensors = [given[name] for name in names if isinstance(given[name], Tensor)]
    asked = ["triton", *(["cuda"] if op in OF_CUDA else [])] if backend == "auto" else [backend]
    answers = {b: available(op, device, tensors, b) for b in asked}
    backends = [b for b, (ok, _) in answers.items() if ok]
    if not backends:
        reason = answers[asked[0]][1]
        if backend == "auto":
            return reason
        raise BackendError(f"backend {backend!r} cannot serve {op}: {reason}")
    given = _readable(steps, node, given)
    arguments = [given[name] for name in names]
    form = Form(backends[0]) if len(backends) == 1 else choose.of_operator(op, arguments, backends)
    return lower_operator(form, steps, node.name, op, arguments, arch)


def _conv2d(convolutions: Convolutions, backend: str, steps: Steps, node: fx.Node, given: _Values) -> Any:
    return convolutions(steps, node, _readable(steps, node, given), backend)


def _attention(
    device: torch.device, arch: str, choose: Choose, backend: str, steps: Steps, node: fx.Node, given: _Values
) -> Any:
    q = given["q"]
    for name in ("k", "v"):
        if given[name].dtype != q.dtype:
            out = steps.keep(without_data.empty_like(given[name], q.dtype))
            given = given | {name: copied(steps, node, given[name], out, "its dtype is another")}
    return _serve("attention", device, arch, choose, backend, steps, node, given)


def _readable(steps: Steps, node: fx.Node, given: _Values) -> _Values:
    """The arguments with rows that lie as the kernels read them; a plan cannot copy what has no data yet."""
    for name in (*_DENSE, *_ROWS):
        x = given.get(name)
        if not isinstance(x, Tensor) or not x.is_meta or not steps.owns(x):
            continue
        if not (x.is_contiguous() if name in _DENSE else channels_adjoin(x) or math.prod(x.shape) < 2):
            out = steps.keep(torch.empty(x.shape, dtype=x.dtype, device="meta"))
            given = given | {name: copied(steps, node, x, out, "a row's elements are not adjacent")}
    return given
