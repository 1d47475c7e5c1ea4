"""Operators other than the convolution as steps: launches of Triton's kernels, or of csrc/cuda's, which has a few."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...kernels.cuda.attention import launch_attention
from ...kernels.cuda.group_norm import launch_group_norm
from ...kernels.layout import concatenated_shape, empty_in_order
from ..steps import Step, Steps
from .forms import Form
from .launches import launched, planner


def lower_operator(form: Form, steps: Steps, name: str, op: str, arguments: Sequence[Any], arch: str) -> Any:
    """Add a call's steps, for the node of this name, from its arguments in the order of its schema; its results."""
    if form.backend == "cuda":
        return OF_CUDA[op](steps, name, *arguments)
    return launched(steps, name, op, planner(op)(*arguments, arch=arch))


def _attention(steps: Steps, name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = steps.keep(empty_in_order(q, q.shape)), steps.row(*q.shape[:3])
    steps.add(Step(name, "attention", launch_attention, (out, lse, q, k, v, scale)))
    return out, lse


def _group_norm(
    steps: Steps, name: str, h: Tensor, skip: Tensor | None, num_groups: int, *others: Any
) -> tuple[Tensor, ...]:
    shape = concatenated_shape(h, skip)
    outs = steps.image(shape, h.dtype), steps.row(len(h), num_groups), steps.row(len(h), num_groups)
    steps.add(Step(name, "group_norm", launch_group_norm, (*outs, h, skip, num_groups, *others)))
    return outs


#: The operators of csrc/cuda that the engine's graphs have: what adds the steps of a call, and returns its results.
OF_CUDA: dict[str, Callable[..., Any]] = {"attention": _attention, "group_norm": _group_norm}
