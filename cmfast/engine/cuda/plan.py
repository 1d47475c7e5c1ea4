"""What a GPU would run for a network evaluation, found without one: each launch with its work and its least time.

The graph is that of the target, by the same passes, and so are the launches; only the weights have no memory.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...kernels.static import GPUS, Gpu
from ..capture import capture
from ..graph import CONV, Graph, arguments, shape, value
from ..lower import lower
from ..passes import GPU_PASSES, PASSES
from ..steps import Step, Steps
from .convolutions import Convolutions, without_memory
from .cudnn import PRODUCTS
from .launches import launch_of
from .measurements import shipped_for
from .rule import Rule
from .served import kernels

_ops = torch.ops.cmfast
#: Multiplications and additions for each element, of operators that do a few.
_OF_AN_ELEMENT: dict[Any, int] = {
    _ops.channel_moments.default: 4,
    _ops.fold_group_norm.default: 12,
    _ops.group_norm.default: 10,
    _ops.apply_group_norm.default: 6,
    _ops.channel_norm.default: 8,
    _ops.timestep_embedding.default: 20,
}


class PlannedLaunch(NamedTuple):
    """One launch of an evaluation, or one call of torch's.

    Attributes:
        layer: name of the graph's node.
        operator: what it serves a part of.
        shape: of the operator's first result.
        programs: of its grid; 0 where torch or csrc/cuda makes the launch.
        flops: multiplications and additions.
        bytes: what it reads and writes, each tensor once, but what stays within the launch both written and read.
        scratch_bytes: of those, what stays within the launch.
        floor_seconds: the least time for these operations and bytes on the GPU.
        reason: why torch serves it; "" for a kernel.
    """

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
    nodes = {node.name: node for node in graph.nodes.nodes}
    working = {step.name: step for step in steps.steps}  # of several, the last, or the one that multiplies
    working |= {step.name: step for step in steps.steps if step.operator in PRODUCTS}
    return [
        _planned(steps, i, step, nodes[step.name], working[step.name] is step, dtype, card)
        for i, step in enumerate(steps.steps)
    ]


def plan_step(sample: Tensor, *, dtype: torch.dtype, gpu: str) -> PlannedLaunch:
    """The launch of the consistency step after an evaluation, for samples [N, C, *spatial] without data."""
    planner = importlib.import_module("...kernels.triton.consistency", __package__).plan_consistency_step
    x = torch.empty(sample.shape, device="meta")
    (launch,), outputs = planner(x, x.to(dtype), [None] * 5, [1.0] * 5, -1.0, 1.0, None, 0, 1, 0, True, True)
    moved = _bytes([x, x.to(dtype), *outputs])
    floor = _floor(GPUS[gpu], torch.float32, moved, 0)
    return PlannedLaunch(
        "step", "consistency_step", tuple(x.shape), math.prod(launch.grid), 7 * x.numel(), moved, 0, floor, ""
    )


def _without_memory(graph: Graph) -> None:
    """Put tensors of the same shapes in the places of the weights: of matrices with the memory of one element."""
    for name, t in graph.tensors.items():
        if t.is_meta:
            graph.tensors[name] = (
                torch.zeros((), dtype=t.dtype).expand(t.shape) if t.ndim > 1 else torch.zeros_like(t, device="cpu")
            )


def _planned(
    steps: Steps, i: int, step: Step, node: fx.Node, works: bool, dtype: torch.dtype, card: Gpu
) -> PlannedLaunch:
    tensors = {id(t): t for t in pytree.tree_leaves(step.arguments) if isinstance(t, Tensor)}
    inside = [t for t in tensors.values() if t.is_meta and steps.buffer(t).first == steps.buffer(t).last == i]
    scratch = 2 * _bytes(inside)
    moved = _bytes(tensors.values()) - _bytes(inside) + scratch
    flops = _flops(node) if works else 0
    launch = launch_of(step)
    out = value(node)
    return PlannedLaunch(
        layer=step.name,
        operator=step.operator,
        shape=tuple((out if isinstance(out, Tensor) else out[0]).shape),
        programs=0 if launch is None else math.prod(launch.grid),
        flops=flops,
        bytes=moved,
        scratch_bytes=scratch,
        floor_seconds=_floor(card, dtype if node.target in (CONV, _ops.attention.default) else None, moved, flops),
        reason=step.reason,
    )


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _flops(node: fx.Node) -> int:
    """Multiplications and additions of a node, each counted as one."""
    out = value(node)
    first = out if isinstance(out, Tensor) else out[0]
    if node.target is CONV:
        return 2 * first.numel() * math.prod(shape(arguments(node)["weight"])[1:])
    if node.target is _ops.attention.default:
        a = arguments(node)
        return 4 * value(a["q"]).numel() * shape(a["k"])[2]
    return first.numel() * _OF_AN_ELEMENT.get(node.target, 1)


def _floor(card: Gpu, products: torch.dtype | None, moved: int, flops: int) -> float:
    """The time that the bytes or the operations take, whichever is longer; `products` is the dtype of a product's."""
    return max(moved / card.bandwidth, flops / card.flops(products))
