"""The launches of the operators' calls in the released networks."""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence

from ..shapes import Call, calls
from . import attention, consistency, group_norm
from .launch import Launch

_PLANS = {
    "group_norm": group_norm.plan_group_norm,
    "group_norm_backward": group_norm.plan_group_norm_backward,
    "attention": attention.plan_attention,
    "attention_backward": attention.plan_attention_backward,
    "consistency_step": consistency.plan_consistency_step,
    "consistency_step_backward": consistency.plan_consistency_step_backward,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator, what the operator launches for it, and the operations of each launch."""

    call: Call
    launches: Sequence[Launch]
    flops: Sequence[int]


def cases(arch: str, ops: Sequence[str] | None = None) -> Iterator[Case]:
    """Plan the calls of the operators (None: of all) for an architecture."""
    for call in calls(ops):
        plan = _PLANS[call.op]
        chosen = {"arch": arch} if "arch" in inspect.signature(plan).parameters else {}
        launches, _ = plan(*call.arguments, **chosen)
        yield Case(call, launches, call.flops_of(len(launches)))
