"""What a GPU would run for a network evaluation, found without one: each launch with its work and its least time.

The graph is that of the target, by the same passes, and so are the launches; only the weights have no memory.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.static import GPUS, Gpu
from .. import work
from ..capture import capture
from ..graph import Graph, value
from ..lower import lower
from ..passes import GPU_PASSES, PASSES
from ..steps import Step, Steps
from .convolutions import Convolutions, without_memory
from .launches import launch_of
from .measurements import shipped_for
from .rule import Rule
from .served import kernels


class PlannedLaunch(NamedTuple):
    """One launch of an evaluation, or one call of torch's.

    Attributes:
        name: of the graph's node.
        layer: the dotted name of the network's module that it is of; "" for the network itself.
        operator: what it serves a part of.
        shape: of the operator's first result.
        programs: of its grid; 0 where torch or csrc/cuda makes the launch.
        flops: multiplications and additions of products (see `engine.work`).
        bytes: what it reads and writes, each tensor once, but what stays within the launch both written and read.
        scratch_bytes: of those, what stays within the launch.
        floor_seconds: the least time for these operations and bytes on the GPU.
        reason: why torch serves it; "" for a kernel.
    """

    name: str
    layer: str
    operator: str
    shape: tuple[int, ...]
    programs: int
    flops: int
    bytes: int
    scratch_bytes: int
    floor_seconds: float
    reason: str


def plan(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    gpu: str = "H100",
) -> list[PlannedLaunch]:
    """The launches of an evaluation on a GPU, in order.

    Args:
        network: any module, in evaluation mode; its parameters may be on the device "meta".
        args: of its forward; tensors may be on the device "meta".
        kwargs: of its forward, by name.
        dtype: of the values between layers and the operands of products: float32, float16 or bfloat16.
        gpu: a name of `kernels.static.GPUS`.

    Raises:
        ValueError: a GPU that is not known.
        CaptureError: the network cannot be captured for these arguments.
    """
    if gpu not in GPUS:
        raise ValueError(f"plan: gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    card = GPUS[gpu]
    with torch.no_grad():
        graph = capture(network, args, dict(kwargs or {}))
        for rewrite in (*PASSES.values(), *GPU_PASSES.values()):
            rewrite(graph)
    _without_memory(graph)
    device, choose = torch.device("meta"), Rule(card.arch, shipped_for(gpu))
    weights = lambda name, weight, backend: without_memory(weight, dtype, backend)  # noqa: E731
    convolutions = Convolutions(device, dtype, card.arch, weights, choose)
    steps = lower(graph, kernels(device, dtype, card.arch, convolutions))
    flops = work.operations_of(steps.steps)
    return [_planned(steps, i, step, flops[i], dtype, card) for i, step in enumerate(steps.steps)]


def plan_step(sample: Tensor, *, dtype: torch.dtype, gpu: str) -> PlannedLaunch:
    """The launch of the consistency step after an evaluation, for samples [N, C, *spatial] without data."""
    planner = importlib.import_module("...kernels.triton.consistency", __package__).plan_consistency_step
    x = torch.empty(sample.shape, device="meta")
    (launch,), outputs = planner(x, x.to(dtype), [None] * 5, [1.0] * 5, -1.0, 1.0, None, 0, 1, 0, True, True)
    moved = sum(t.numel() * t.element_size() for t in (x, x.to(dtype), *outputs))
    floor = moved / GPUS[gpu].bandwidth
    shape = tuple(x.shape)
    return PlannedLaunch("step", "", "consistency_step", shape, math.prod(launch.grid), 0, moved, 0, floor, "")


def _without_memory(graph: Graph) -> None:
    """Put tensors of the same shapes in the places of the weights: of matrices with the memory of one element."""
    for name, t in graph.tensors.items():
        if t.is_meta:
            graph.tensors[name] = (
                torch.zeros((), dtype=t.dtype).expand(t.shape) if t.ndim > 1 else torch.zeros_like(t, device="cpu")
            )


def _planned(steps: Steps, i: int, step: Step, flops: int, dtype: torch.dtype, card: Gpu) -> PlannedLaunch:
    moved, scratch = work.bytes_of(steps, i)
    launch = launch_of(step)
    assert step.node is not None
    out = value(step.node)
    return PlannedLaunch(
        name=step.name,
        layer=step.layer,
        operator=step.operator,
        shape=tuple((out if isinstance(out, Tensor) else out[0]).shape),
        programs=0 if launch is None else math.prod(launch.grid),
        flops=flops,
        bytes=moved,
        scratch_bytes=scratch,
        floor_seconds=max(moved / card.bandwidth, flops / card.flops(dtype)),
        reason=step.reason,
    )
