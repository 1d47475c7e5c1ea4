"""What torch computes within a program: where its results go, and in which order it goes through memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

#: Operators that are as fast as memory in one order of the dimensions only, whichever the tensors' is: torch copies a
#: softmax's input where it is not contiguous, and a concatenation is laid as if its inputs were.
IN_MEMORY_ORDER = (_aten._softmax.default, _aten.cat.default)
#: Operators whose results torch writes where it is told to, however that lies; so it does those of elements.
_WRITTEN_IN_PLACE = (
    *IN_MEMORY_ORDER,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.mm.default,
    _aten.addmm.default,
)


@dataclasses.dataclass(frozen=True)
class InMemoryOrder:
    """A softmax or a concatenation with the dimensions in the order in which its largest input lies in memory."""

    target: Any

    def __call__(self, /, out: Tensor | None = None, **arguments: Any) -> Tensor:
        """The operator's result, which lies as the largest input does; written to `out` where one is given."""
        name = "tensors" if "tensors" in arguments else "self"
        inputs = arguments[name] if name == "tensors" else [arguments[name]]
        largest = max(inputs, key=Tensor.numel)
        # A number has no order, nor has an empty part of one dimension, which is passed over.
        if not largest.ndim or any(x.ndim != largest.ndim for x in inputs):
            return _written(self.target, arguments, out)
        order = sorted(range(largest.ndim), key=largest.stride, reverse=True)
        moved = [x.permute(order) for x in inputs]
        dim = order.index(arguments["dim"] % largest.ndim)
        arguments |= {name: moved if name == "tensors" else moved[0], "dim": dim}
        result = _written(self.target, arguments, None if out is None else out.permute(order))
        return result.permute([order.index(d) for d in range(largest.ndim)])


def _written(target: Any, arguments: dict[str, Any], out: Tensor | None) -> Tensor:
    if out is None:
        return target(**arguments)
    if target is _aten._softmax.default and not out.is_contiguous():  # it would be written as if it were
        return out.copy_(target(**arguments))
    return _out_variant(target)(**arguments, out=out)


@dataclasses.dataclass(frozen=True)
class Computed:
    """Compute with torch, the results where they are expected.

    Attributes:
        target: the operator, or what stands for it.
        variant: what takes the tensor that its one result is written to; None where the results are copied there.
    """

    target: Any
    variant: Any

    @classmethod
    def of(cls, target: Any) -> "Computed":
        """An operator, written in place where torch can do so."""
        if isinstance(target, InMemoryOrder):
            return cls(target, target)
        tags = getattr(target, "tags", ())
        return cls(target, _out_variant(target) if target in _WRITTEN_IN_PLACE or torch.Tag.pointwise in tags else None)

    def __call__(self, outs: Sequence[Tensor | None], given: dict[str, Any]) -> None:
        """Write the results, but for those that nothing reads, which are None."""
        if self.variant is not None:
            self.variant(**given, out=outs[0])
            return
        result = self.target(**given)
        for out, part in zip(outs, [result] if isinstance(result, Tensor) else result, strict=True):
            if out is not None:
                out.copy_(part)


def _out_variant(target: Any) -> Any:
    """The overload of an operator of one result that takes the same arguments, and `out`; None where there is none."""
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments] + [("out", "Tensor")]
    packet = target.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if len(target._schema.returns) == 1 and [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
            return overload
    return None
