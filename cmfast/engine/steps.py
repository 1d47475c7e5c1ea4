"""The steps of a network evaluation, and the memory that they read and write."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .arena import Buffer
from .graph import layer, storage


@dataclasses.dataclass
class Step:
    """A call that reads and writes memory which is there beforehand.

    Attributes:
        name: of the graph's node.
        operator: what is called, for reports.
        call: takes `arguments`, in which tensors without data stand for views of buffers.
        arguments: of the call.
        reason: why torch serves it; "" for a step of the kernels.
        node: of the graph, whose value it makes a part of or all.
    """

    name: str
    operator: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    reason: str = ""
    node: fx.Node | None = None

    @property
    def layer(self) -> str:
        """The dotted name of the network's module that it is of; "" for the network itself."""
        return "" if self.node is None else layer(self.node)


class StepTime(NamedTuple):
    """A step and the seconds that it took."""

    step: Step
    seconds: float


class Timed(NamedTuple):
    """An evaluation whose steps were timed.

    Attributes:
        outputs: of the evaluation.
        filling: seconds of copying the inputs to where the steps read them.
        steps: in order.
        giving: seconds of copying the outputs from where the steps wrote them.
    """

    outputs: list[Tensor]
    filling: float
    steps: list[StepTime]
    giving: float


class Steps:
    """Steps in order, and their values: tensors without data, each a view of a buffer that lives while it is needed.

    Attributes:
        steps: what there is to do.
        buffers: the memory for it.
        counters: memory of its own for integers that are zero before the first step, and again after the last.
        inputs: the values that are given before the first step.
        outputs: the values that are wanted after the last: a tensor, or a structure of them.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.counters: list[Buffer] = []
        self.inputs: list[Tensor] = []
        self.outputs: Any = None
        self._owners: dict[int, Buffer] = {}

    def keep(self, value: Tensor) -> Tensor:
        """Make a buffer for a dense value that the next step writes."""
        buffer = Buffer(value, len(self.steps), len(self.steps))
        self.buffers.append(buffer)
        self._owners[storage(value)] = buffer
        return value

    def count(self, value: Tensor) -> Tensor:
        """Make memory that no other value has for counters that the steps leave at zero."""
        buffer = Buffer(value, 0, 0)
        self.counters.append(buffer)
        self._owners[storage(value)] = buffer
        return value

    def row(self, *shape: int) -> Tensor:
        """Make a buffer for a float32 value whose last dimension is innermost."""
        return self.keep(torch.empty(shape, dtype=torch.float32, device="meta"))

    def image(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make a buffer for [N, C, *spatial] with the channels innermost."""
        dense = torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device="meta")
        return self.keep(dense.movedim(-1, 1))

    def give(self, like: Tensor, *, image: bool) -> None:
        """Append an input of this shape and dtype, which may be kept with its channels innermost."""
        dense = torch.empty(like.shape, dtype=like.dtype, device="meta")
        value = self.image(like.shape, like.dtype) if image else self.keep(dense)
        self.buffer(value).first = -1
        self.inputs.append(value)

    def lend(self, like: Tensor) -> Tensor:
        """Append an input that lies in memory as a tensor without data does."""
        value = self.keep(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta"))
        self.buffer(value).first = -1
        self.inputs.append(value)
        return value

    def want(self, outputs: Any) -> None:
        """Say what is read after the last step."""
        self.outputs = outputs
        self._read(outputs)

    def add(self, step: Step) -> None:
        """Append a step; what it reads lives until then."""
        self._read(step.arguments)
        self.steps.append(step)

    def _read(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self.buffer(leaf).last = len(self.steps)

    def buffer(self, value: Tensor) -> Buffer:
        """The buffer that a value is a view of."""
        return self._owners[storage(value)]

    def owns(self, value: Tensor) -> bool:
        """Whether a tensor is a view of a buffer."""
        return storage(value) in self._owners
