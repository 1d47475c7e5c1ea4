"""The memory of the engine's programs: how much their values take at each step, and the weights that it reads."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..engine import work
from ..engine.trace import Run, Trace
from .table import table


class StepMemory(NamedTuple):
    """The memory at one step, or while a layer runs.

    Attributes:
        name: of the graph's node; "" for a layer.
        layer: the dotted name of the module that it is of.
        operator: what runs; "" for a layer.
        live_bytes: of the values that live while it runs: of a layer, the most.
        end_bytes: where the last of them ends in the arena: of a layer, the most.
        written_bytes: of the values that it writes.
        weight_bytes: of the weights that it reads, and nothing before it.
    """

    name: str
    layer: str
    operator: str
    live_bytes: int
    end_bytes: int
    written_bytes: int
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a call's programs; as a string, a table by layer.

    Attributes:
        arena_bytes: of the blocks that the values of the programs lie in, one a program.
        packed_bytes: of the packed weights.
        steps: of each program, in order.
    """

    arena_bytes: int
    packed_bytes: int
    steps: list[StepMemory]

    @property
    def peak(self) -> StepMemory:
        """The step at which most bytes of values live; of programs without steps, a step of no bytes."""
        return max(self.steps, key=lambda step: step.live_bytes, default=_layer("", []))

    def by_layer(self, depth: int | None = None) -> list[StepMemory]:
        """The steps by layer, or by the first `depth` parts of its name; those of the most live bytes first."""
        found: dict[str, list[StepMemory]] = {}
        for step in self.steps:
            found.setdefault(".".join(step.layer.split(".")[:depth]), []).append(step)
        layers = [_layer(name, steps) for name, steps in found.items()]
        return sorted(layers, key=lambda s: (s.live_bytes, s.weight_bytes), reverse=True)

    def report(self, depth: int | None = 2) -> str:
        """The table as text; layers are named by the first `depth` parts of their names."""
        peak = self.peak
        where = f", at {peak.layer or 'the network itself'} ({peak.operator})" if self.steps else ""
        headline = (
            f"memory: {self.arena_bytes / 1e6:.2f} MB for values, of which at most {peak.live_bytes / 1e6:.2f} live"
            f"{where}; {self.packed_bytes / 1e6:.2f} MB of packed weights"
        )
        rows = [
            [layer.layer or "(the network itself)", *(f"{size / 1e6:.3f}" for size in (layer.live_bytes, *layer[5:]))]
            for layer in self.by_layer(depth)
        ]
        return f"{headline}\n{table(['layer', 'live MB', 'written MB', 'weights MB'], rows)}"

    def __str__(self) -> str:
        return self.report()

    def summary(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dataclasses.asdict(self) | {"steps": [step._asdict() for step in self.steps]}


def memory_of(trace: Trace, names: Mapping[nn.Module, str]) -> Memory:
    """The memory of the programs that ran; `names` are those of the modules.

    Raises:
        ValueError: none ran.
    """
    runs = list({id(run.executable): run for run in trace.runs}.values())
    if not runs:
        raise ValueError("memory is planned for what the engine runs, and it ran nothing: accelerate the network")
    seen: set[int] = set()
    steps = [step for run in runs for step in _steps(run, names.get(run.module, ""), seen)]
    targets = {id(run.target): run.target for run in runs}.values()
    return Memory(sum(run.executable.bytes for run in runs), sum(target.bytes for target in targets), steps)


def _steps(run: Run, module: str, seen: set[int]) -> Iterator[StepMemory]:
    steps = run.executable.steps
    for i, step in enumerate(steps.steps):
        live = [buffer for buffer in steps.buffers if buffer.first <= i <= buffer.last]
        read = {t.data_ptr(): t.nbytes for t in work.tensors_of(step.arguments) if not t.is_meta}
        weights = sum(size for place, size in read.items() if place not in seen)
        seen |= read.keys()
        yield StepMemory(
            name=step.name,
            layer=".".join(part for part in (module, step.layer) if part),
            operator=step.operator,
            live_bytes=sum(buffer.bytes for buffer in live),
            end_bytes=max((buffer.offset + buffer.bytes for buffer in live), default=0),
            written_bytes=sum(buffer.bytes for buffer in live if buffer.first == i),
            weight_bytes=weights,
        )


def _layer(name: str, steps: list[StepMemory]) -> StepMemory:
    live, end = (max((getattr(step, field) for step in steps), default=0) for field in ("live_bytes", "end_bytes"))
    written, weights = (sum(getattr(step, field) for step in steps) for field in ("written_bytes", "weight_bytes"))
    return StepMemory("", name, "", live, end, written, weights)
