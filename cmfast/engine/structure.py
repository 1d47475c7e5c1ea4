"""Nested arguments and outputs, taken apart into their tensors and put together again."""

import dataclasses
import enum
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CONSTANTS = (bool, int, float, complex, str, bytes, range, enum.Enum, torch.dtype, torch.device, torch.memory_format)


class Structure(NamedTuple):
    """What a value is beside its tensors; equal structures are equal in all that is no tensor, and hash alike.

    Attributes:
        kind: "tensor", "constant", "sequence", "mapping" or "dataclass".
        type: of the value.
        constant: the value itself, where it is one; of a defaultdict, what makes its defaults.
        names: keys of a mapping, fields of a dataclass; of a float its sign, which 0.0 and -0.0 differ in.
        parts: of what it is made.
    """

    kind: str
    type: type
    constant: Any = None
    names: tuple[Any, ...] = ()
    parts: tuple["Structure", ...] = ()

    def build(self, tensors: Sequence[Any]) -> Any:
        """The value of this structure with these tensors, in the order in which `flatten` found them."""
        left = iter(tensors)
        return self._build(left)

    def _build(self, tensors: Any) -> Any:
        if self.kind == "tensor":
            return next(tensors)
        if self.kind == "constant":
            return self.constant
        parts = [part._build(tensors) for part in self.parts]
        if self.kind == "sequence":
            return self.type(*parts) if hasattr(self.type, "_fields") else self.type(parts)
        named = dict(zip(self.names, parts, strict=True))
        if self.kind == "dataclass":
            return self.type(**named)
        return defaultdict(self.constant, named) if self.type is defaultdict else self.type(named)


_TENSOR = Structure("tensor", Tensor)


def flatten(value: Any) -> tuple[list[Tensor], Structure]:
    """The tensors in tuples, lists, dicts and dataclasses, however nested, and the structure around them.

    Raises:
        TypeError: there is something in it that is neither of these nor None, a number, a string or the like.
    """
    tensors: list[Tensor] = []
    return tensors, _structure(value, tensors)


def _structure(value: Any, tensors: list[Tensor]) -> Structure:
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR
    if value is None or isinstance(value, _CONSTANTS):
        return Structure("constant", kind, value, (math.copysign(1.0, value),) if isinstance(value, float) else ())
    if dataclasses.is_dataclass(value):
        if any(not field.init for field in dataclasses.fields(value)):
            raise TypeError(f"{kind.__name__} has fields that its __init__ does not take, and cannot be made again")
        names = tuple(field.name for field in dataclasses.fields(value) if field.init)
        return Structure("dataclass", kind, None, names, _all((getattr(value, name) for name in names), tensors))
    if isinstance(value, Mapping):
        default = value.default_factory if isinstance(value, defaultdict) else None
        return Structure("mapping", kind, default, tuple(value), _all(value.values(), tensors))
    if isinstance(value, tuple | list):
        return Structure("sequence", kind, None, (), _all(value, tensors))
    raise TypeError(
        f"expected tensors, None, numbers, strings, and tuples, lists, dicts and dataclasses of them, got {kind}"
    )


def _all(values: Any, tensors: list[Tensor]) -> tuple[Structure, ...]:
    return tuple(_structure(value, tensors) for value in values)
