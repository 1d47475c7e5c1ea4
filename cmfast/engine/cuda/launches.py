"""Planned launches of the Triton kernels as steps of an evaluation.

They are planned on tensors without data: `plan_<operator>` of kernels/triton reads none. What the launches write
becomes buffers: outputs, and scratch between the launches of one operator.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ...kernels import backends
from ...kernels import triton as kernels_of_triton
from ...kernels.triton.launch import Launch, launching
from ..graph import storage
from ..steps import Step, Steps


def available(
    op: str,
    device: torch.device,
    tensors: Sequence[Tensor],
    backend: str = "triton",
    arguments: Sequence[Any] | None = None,
) -> tuple[bool, str]:
    """Whether a backend serves an operator for tensors of these shapes and dtypes on the device, or why not.

    `arguments` are those of its function, where the answer may depend on more than the tensors.

    On "meta", for a plan, csrc/cuda is asked for a GPU.
    """
    if device.type == "meta" and backend == "cuda":
        with FakeTensorMode():
            return backends.available(backend, op, [stand_in(t, torch.device("cuda")) for t in tensors], arguments)
    return backends.available(backend, op, [stand_in(t, device) for t in tensors], arguments)


def stand_in(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the shape and dtype of t on a device, with the memory of one element."""
    return torch.empty((), dtype=t.dtype, device=device).expand(t.shape)


def planner(op: str) -> Any:
    """The function that plans an operator's launches. It imports triton, which takes a while."""
    module = kernels_of_triton._MODULES[op]
    return getattr(importlib.import_module(f"{kernels_of_triton.__name__}.{module}"), f"plan_{op}")


def launched(steps: Steps, name: str, op: str, planned: tuple[Sequence[Launch], Any]) -> Any:
    """Add a step a launch, for the graph's node of this name, and memory for all that they write; the results."""
    launches, outputs = planned
    results = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    of_results = {storage(t) for t in results}
    for launch in launches:
        for t in launch.args:
            if isinstance(t, Tensor) and t.is_meta and not steps.owns(t):
                scratch = storage(t) not in of_results
                steps.count(t) if scratch and t.dtype == torch.int32 else steps.keep(t)
        operator = op if len(launches) == 1 else f"{op} ({launch.kernel.__name__})"
        steps.add(Step(name, operator, functools.partial(_launch, launch), launch.args))
    for t in results:
        if not steps.owns(t):  # no launch writes it: it is empty
            steps.keep(t)
    return outputs


def launch_of(step: Step) -> Launch | None:
    """The planned launch that a step makes; None of a step that is none of Triton's."""
    call = step.call
    return call.args[0] if isinstance(call, functools.partial) and call.func is _launch else None


def _launch(launch: Launch, *arguments: Any) -> None:
    """Run a launch on other tensors than it was planned with."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    with launching:
        launch.kernel[launch.grid](*arguments, **launch.constants, **options)
