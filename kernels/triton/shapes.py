"""The launches of the operators' calls in the released networks."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence

from ..shapes import Call, calls
from .apply_group_norm import plan_apply_group_norm
from .attention import plan_attention, plan_attention_backward
from .channel_norm import plan_channel_norm
from .consistency import plan_consistency_step, plan_consistency_step_backward
from .conv import plan_conv2d
from .group_norm import plan_group_norm, plan_group_norm_backward
from .launch import Launch
from .moments import plan_channel_moments, plan_fold_group_norm
from .timestep_embedding import plan_timestep_embedding

_PLANS: dict[str, Callable] = {
    "group_norm": plan_group_norm,
    "group_norm_backward": plan_group_norm_backward,
    "channel_moments": plan_channel_moments,
    "fold_group_norm": plan_fold_group_norm,
    "apply_group_norm": plan_apply_group_norm,
    "channel_norm": plan_channel_norm,
    "attention": plan_attention,
    "attention_backward": plan_attention_backward,
    "consistency_step": plan_consistency_step,
    "consistency_step_backward": plan_consistency_step_backward,
    "conv2d": plan_conv2d,
    "timestep_embedding": plan_timestep_embedding,
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
