"""The convolutions of a network on a GPU: each becomes steps in the form that is chosen for it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.backends import BackendError
from ...kernels.conv_arguments import ConvArguments
from ...kernels.cuda.conv import launch_conv2d
from ..graph import arguments
from ..steps import Step, Steps
from ..work import of_convolution
from . import cudnn
from .forms import Choose, Form
from .launches import available, launched, planner

#: The weights of a name as a backend reads them.
GiveWeights = Callable[[str, Tensor, str], Tensor]


class Convolutions:
    """How conv2d calls become steps: a `lower.Serve` for one device, dtype of products and set of weights.

    Attributes:
        choose: which form serves a call.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        arch: str,
        weights: GiveWeights,
        choose: Choose,
        packed_for: Callable[[str], list[str]] = lambda name: [],
    ) -> None:
        """`packed_for` names the backends that weights of a name are packed for: once given up, no other has them."""
        self._device, self._dtype, self._arch = device, dtype, arch
        self._weights, self.choose, self._packed_for = weights, choose, packed_for

    def __call__(self, steps: Steps, node: fx.Node, given: dict[str, Any], backend: str = "auto") -> Any:
        """Add the steps of a call by a backend, or "auto"; its output and moments.

        Raises:
            BackendError: the backend that was named cannot serve it.
        """
        name, weight = str(arguments(node)["weight"].target), given["weight"]
        # Of the weights only the shape is read, and they may be given up: this has no memory.
        shape = torch.empty((), dtype=self._dtype, device="meta").expand(weight.shape)
        taken = {field: given[field] for field in ConvArguments._fields}
        a = ConvArguments(**taken | {"weight": shape, "packed": None, "dtype": self._dtype})
        tensors = [t for t in (a.h, a.skip, shape, a.residual) if t is not None]
        asked = list(LOWERED)[:-1] if backend == "auto" else [backend]
        answers = {b: available("conv2d", self._device, tensors, b, [a]) for b in asked}
        backends = [b for b, (ok, _) in answers.items() if ok]
        if not backends:
            reason = answers[asked[0]][1]
            if backend != "auto":
                raise BackendError(f"backend {backend!r} cannot serve conv2d: {reason}")
            return _by_definition(steps, node.name, a, self._weights(name, weight, "torch"), reason)
        backends += ["torch"] if backend == "auto" else []
        if weight.is_meta:
            backends = [b for b in backends if b in self._packed_for(name)] or backends[:1]
        form = self.choose(a, backends)
        return lower_conv2d(form, steps, node.name, a, self._weights(name, weight, form.backend), self._arch)


def lower_conv2d(form: Form, steps: Steps, name: str, a: ConvArguments, weight: Tensor, arch: str) -> Any:
    """Add the steps of a call in a form, with weights packed for its backend; its output and moments."""
    return LOWERED[form.backend](form, steps, name, a, weight, arch)


def _by_triton(form: Form, steps: Steps, name: str, a: ConvArguments, weight: Tensor, arch: str) -> Any:
    options = {} if form.config is None else {"choose": lambda *problem: form.config}
    return launched(steps, name, "conv2d", planner("conv2d")(a._replace(packed=weight), arch=arch, **options))


def _by_cuda(form: Form, steps: Steps, name: str, a: ConvArguments, weight: Tensor, arch: str) -> Any:
    shape = a.output_shape()
    out = steps.image(shape, a.h.dtype)
    moments = steps.row(shape[0], 2, shape[1]) if a.moments else None
    unpacked = weight.unflatten(0, (*a.weight.shape[2:], -1)).movedim((-1, -2), (0, 1))  # a view, for its shape
    steps.add(Step(name, "conv2d", launch_conv2d, (out, moments, a._replace(weight=unpacked, packed=weight))))
    return out, moments


def _by_torch(form: Form, steps: Steps, name: str, a: ConvArguments, weight: Tensor, arch: str) -> Any:
    return cudnn.lower_conv2d(steps, name, a, weight, arch)


#: backend: how a call becomes its steps; ours in the order in which they are taken, torch's last.
LOWERED: dict[str, Callable[[Form, Steps, str, ConvArguments, Tensor, str], Any]] = {
    "triton": _by_triton,
    "cuda": _by_cuda,
    "torch": _by_torch,
}


def _by_definition(steps: Steps, name: str, a: ConvArguments, weight: Tensor, reason: str) -> Any:
    """What no kernel serves: the operator itself, on whichever backend has it."""
    out = steps.image(a.output_shape(), a.h.dtype)
    moments = steps.row(out.shape[0], 2, out.shape[1]) if a.moments else None
    steps.add(Step(name, "cmfast.conv2d", _write, (out, moments, a._replace(weight=weight)), reason))
    return out, moments


def _write(out: Tensor, moments: Tensor | None, a: ConvArguments) -> None:
    found, sums = torch.ops.cmfast.conv2d(*a, None)
    out.copy_(found)
    if moments is not None:
        moments.copy_(sums)


def without_memory(weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Weights for a plan, of the shape and strides that a backend's have."""
    if backend == "torch":
        return torch.empty((), dtype=dtype).expand(weight.shape)
    return torch.empty((), dtype=dtype).expand(math.prod(weight.shape[1:]), weight.shape[0])


def flops(a: ConvArguments) -> int:
    """Multiplications and additions of a call, each counted as one."""
    return of_convolution(a.output_shape(), a.weight.shape)


def alone(a: ConvArguments) -> tuple[Steps, ConvArguments]:
    """Steps that have a call's arguments as their inputs, and the call with these; rows that have data stay."""
    steps = Steps()
    given = {name: getattr(a, name) for name in ("h", "skip", "gain", "offset", "bias", "residual")}
    return steps, a._replace(**{k: steps.lend(t) if t is not None and t.is_meta else t for k, t in given.items()})
