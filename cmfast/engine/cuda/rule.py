"""Which form serves a call without a measurement of it here: what was measured on this card, else ours.

Of a card that ships with measurements, a call that is among them has its fastest form. Of any other convolution the
time by each backend is estimated: each launch takes what a launch takes, and the time of its bytes or of its
operations, whichever is longer, at the rates that were measured. Without rates, nothing says that our kernels are the
slower ones.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.conv_arguments import ConvArguments
from ..graph import storage
from .convolutions import alone, flops, lower_conv2d, without_memory
from .forms import Form, candidates
from .measurements import Measurements, describe, describe_operator


@dataclasses.dataclass(frozen=True)
class Rule:
    """Chooses forms for calls on a card of this architecture: a `forms.Choose`.

    Attributes:
        arch: the architecture.
        measured: what is known of the card, if anything is.
    """

    arch: str
    measured: Measurements | None = None

    def __call__(self, a: ConvArguments, backends: Collection[str]) -> Form:
        """The form of a call, of those of the backends."""
        ours, *others = (Form(backend) for backend in backends)
        if self.measured is None:
            return ours
        fastest = self._fastest(describe(a), candidates(a, backends, self.arch))
        if fastest is not None:
            return fastest
        estimates = {form: self._estimate(form, a, self.measured) for form in (ours, *others)}
        if None in estimates.values():
            return ours
        return min(estimates, key=lambda form: estimates[form] or 0.0)

    def of_operator(self, op: str, arguments: Sequence[Any], backends: Collection[str]) -> Form:
        """The form of another operator's call: what was measured to be the fastest, else of the first backend."""
        forms = [Form(backend) for backend in backends]
        return self._fastest(describe_operator(op, arguments), forms) or forms[0]

    def _fastest(self, call: str, forms: Sequence[Form]) -> Form | None:
        """What was measured to be the fastest of the forms; None where none of them was measured."""
        known = {} if self.measured is None else self.measured.seconds(call)
        times = {form: s for form in forms if (s := known.get(str(form))) is not None}
        return min(times, key=times.__getitem__) if times else None

    def _estimate(self, form: Form, a: ConvArguments, measured: Measurements) -> float | None:
        """Seconds of a call; None where a rate is not known."""
        products = measured.flops_per_second(form.backend, a.dtype)
        if products is None or not measured.bytes_per_second:
            return None
        steps, given = alone(a)
        weight = without_memory(a.weight, a.dtype, form.backend)
        lower_conv2d(form, steps, "conv2d", given, weight, self.arch)
        seconds = 0.0
        for step in steps.steps:
            tensors = {id(t): t for t in pytree.tree_leaves(step.arguments) if isinstance(t, Tensor)}.values()
            moved = sum(t.numel() * t.element_size() for t in tensors)
            multiplies = any(storage(t) == storage(weight) for t in tensors)
            arithmetic = flops(a) / products if multiplies else 0.0
            seconds += measured.launch_seconds + max(moved / measured.bytes_per_second, arithmetic)
        return seconds
