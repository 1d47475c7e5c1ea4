"""The profile of a call: its rows, and what sums them up."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..engine.trace import Trace
from ..environment import describe
from ..files import whole_file
from .ceilings import Ceilings
from .chrome import events
from .memory import Memory, memory_of
from .recording import Operation
from .roofline import Point, draw
from .table import table

#: Rows of the table by layer: the rest is summed up in one.
_MOST_LAYERS = 24
#: Floors of a call from which on the distance to them says something: below, it is the call itself that takes time.
_SHORTEST = 2e-7
#: The row of what is in no operator.
_PYTHON = "Python: calls, checks for changes"


class Group(NamedTuple):
    """Rows of a profile that are alike.

    Attributes:
        name: of an operator, a layer or a stage.
        calls: how many rows there are.
        seconds, operations, bytes, floor_seconds: sums of theirs.
    """

    name: str
    calls: int
    seconds: float
    operations: int
    bytes: int
    floor_seconds: float


class Row(NamedTuple):
    """What ran once.

    Attributes:
        name: of the graph's node; "" outside the engine's programs.
        module: the captured module whose program it is in; None outside programs.
        layer: the dotted name of the module that it is of; "" for the network itself. What serves several modules is
            of the innermost one that they are all in.
        stage: of a sampling run; "" otherwise.
        operator: what ran.
        step: the same, with what its time depends on.
        reason: why torch serves it; "" for a kernel of cmfast's, and in a network that is not accelerated.
        seconds: that it took.
        operations: multiplications and additions of products, as FlopCounterMode counts them: of convolutions those of
            their definition.
        bytes: that it reads and writes, each tensor once.
        floor_seconds: the least time for these operations and bytes by the ceilings of the profile.
    """

    name: str
    module: str | None
    layer: str
    stage: str
    operator: str
    step: str
    reason: str
    seconds: float
    operations: int
    bytes: int
    floor_seconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a call goes; as a string, a report with a table by operator and one by layer.

    Attributes:
        title: what was called, and on what.
        network: the name of its type.
        seconds: of the fastest call, which was not recorded.
        median_seconds: the median of the calls.
        rounds: how many calls there were.
        rows: what ran in the call that was recorded right after it, in order; last what was in no operator.
        ceilings: what the machine reached at most, in the same run.
        timeline: the recorded call, with the time at which each operator began.
        trace: what the engine ran in that call.
        names: of the modules.
    """

    title: str
    network: str
    seconds: float
    median_seconds: float
    rounds: int
    rows: list[Row]
    ceilings: Ceilings
    timeline: list[Operation]
    trace: Trace
    names: Mapping[nn.Module, str]

    @property
    def left(self) -> dict[str, str]:
        """Why modules were not captured, by their names."""
        return {self.names.get(module, ""): reason for module, reason in self.trace.left.items()}

    @property
    def operations(self) -> int:
        """Multiplications and additions of all products."""
        return sum(row.operations for row in self.rows)

    @property
    def bytes(self) -> int:
        """That all operators read and write."""
        return sum(row.bytes for row in self.rows)

    @property
    def floor_seconds(self) -> float:
        """The sum of the operators' least times."""
        return sum(row.floor_seconds for row in self.rows)

    def by_operator(self) -> list[Group]:
        """The rows by operator, and of a convolution by its kernel, size and form; the longest first."""
        return self._grouped(lambda row: row.step)

    def by_layer(self, depth: int | None = None) -> list[Group]:
        """The rows by layer, or by the first `depth` parts of its name; the longest first."""
        return self._grouped(lambda row: ".".join(row.layer.split(".")[:depth]) if row.step != _PYTHON else _PYTHON)

    def by_stage(self) -> list[Group]:
        """The rows of a sampling run by its stages, in order."""
        return self._grouped(lambda row: row.stage, in_order=True)

    def _grouped(self, name: Callable[[Row], str], *, in_order: bool = False) -> list[Group]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(name(row), []).append(row)
        groups = [_sum(key, rows) for key, rows in found.items()]
        return groups if in_order else sorted(groups, key=lambda group: group.seconds, reverse=True)

    def memory(self) -> Memory:
        """The memory that the engine planned for the call's programs.

        Raises:
            ValueError: no part of the network ran as a program of the engine.
        """
        return memory_of(self.trace, self.names)

    def __str__(self) -> str:
        return self.report()

    def report(self, depth: int | None = 2) -> str:
        """The report as text; layers are named by the first `depth` parts of their names."""
        lines = [self._headline(), ""]
        if any(row.stage for row in self.rows):
            lines += [self._table("stage", self.by_stage()), ""]
        lines += [self._table("step", self.by_operator()), "", self._table("layer", _few(self.by_layer(depth)))]
        return "\n".join([*lines, "", *self._notes()])

    def _headline(self) -> str:
        total = f"{self.operations / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"
        return (
            f"{self.title}: {1e3 * self.seconds:.2f} ms, the fastest of {self.rounds} (median "
            f"{1e3 * self.median_seconds:.2f}); {total}, floor {1e3 * self.floor_seconds:.2f} ms"
        )

    def _notes(self) -> Iterable[str]:
        c = self.ceilings
        rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {dtype}" for dtype, rate in c.products.items())
        copies = f"copies of {c.copied / 1e6:.3g} MB at {c.bandwidth / 1e9:.3g} GB/s"
        yield f"floors: {copies}, products of matrices at {rates}"
        if any(row.seconds < row.floor_seconds for row in self.rows):
            yield (
                "below 1 x floor: GFLOP are those of the convolutions' definition, of which Winograd's F(4x4) does a "
                "quarter; or values were in a cache"
            )

    def _table(self, title: str, groups: Sequence[Group]) -> str:
        total = sum(row.seconds for row in self.rows)
        digits = 2 if total > 0.01 else 3
        rows = [
            [
                group.name or "(the network itself)",
                str(group.calls),
                f"{1e3 * group.seconds:.{digits}f}",
                f"{100 * group.seconds / total:.1f}",
                f"{group.operations / 1e9:.3f}" if group.operations else "",
                f"{group.bytes / 1e6:.2f}" if group.bytes else "",
                f"{1e3 * group.floor_seconds:.{digits}f}" if group.bytes else "",
                f"{group.seconds / group.floor_seconds:.1f}" if group.floor_seconds > _SHORTEST * group.calls else "",
            ]
            for group in groups
        ]
        return table([title, "calls", "ms", "%", "GFLOP", "MB", "floor ms", "x floor"], rows)

    def to_json(self) -> str:
        """All of it as JSON: {"title", "seconds", …, "ceilings", "not_captured", "environment", "rows"}."""
        return json.dumps(self.summary() | {"environment": describe(), "rows": self.records()}, indent=2)

    def summary(self) -> dict[str, Any]:
        """What is not in the rows, as plain values."""
        names = ("title", "network", "seconds", "median_seconds", "rounds", "operations", "bytes", "floor_seconds")
        plain = {name: getattr(self, name) for name in names}
        return plain | {"ceilings": dataclasses.asdict(self.ceilings), "not_captured": self.left}

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [row._asdict() for row in self.rows]

    def save_trace(self, path: str | Path) -> None:
        """Write the call as a Chrome trace, for chrome://tracing and ui.perfetto.dev.

        Operators are ranges within those of their modules, and these within those of the modules that they are in.

        Raises:
            OSError: the file cannot be written.
        """
        document = {"traceEvents": events(self.network, self.timeline), "displayTimeUnit": "ms"}
        with whole_file(path) as file:
            file.write_text(json.dumps(document | {"otherData": {"title": self.title}}))

    def plot(self, path: str | Path) -> None:
        """Draw a roofline as a PNG: operators by their operations a byte and a second, below the ceilings.

        Raises:
            ValueError: no operator has products.
            OSError: the file cannot be written.
        """
        points = [Point(*group[:5]) for group in self.by_operator() if group.operations]
        busy = sum(row.seconds for row in self.rows)
        draw(points, self.ceilings, busy, f"{self.title}: {1e3 * self.seconds:.2f} ms", path)


def rows_of(timeline: Sequence[Operation], outside: float, ceilings: Ceilings) -> list[Row]:
    """The rows of a recorded call, with its seconds in no operator."""
    rows = [
        Row(
            name=o.name,
            module=o.module,
            layer=o.layer,
            stage=o.stage,
            operator=o.operator,
            step=o.kind,
            reason=o.reason,
            seconds=o.seconds,
            operations=o.operations,
            bytes=o.bytes,
            floor_seconds=ceilings.floor(o.operations, o.bytes, o.products),
        )
        for o in timeline
    ]
    stage = "outside" if any(row.stage for row in rows) else ""
    return [*rows, Row("", None, "", stage, "python", _PYTHON, "", outside, 0, 0, 0.0)]


def _sum(name: str, rows: Sequence[Row]) -> Group:
    sums = (sum(getattr(row, field) for row in rows) for field in ("seconds", "operations", "bytes", "floor_seconds"))
    return Group(name, len(rows), *sums)


def _few(groups: Sequence[Group]) -> list[Group]:
    """The longest, and all others as one."""
    if len(groups) <= _MOST_LAYERS:
        return list(groups)
    rest = groups[_MOST_LAYERS - 1 :]
    sums = (sum(column) for column in list(zip(*rest, strict=True))[1:])
    return [*groups[: _MOST_LAYERS - 1], Group(f"({len(rest)} more)", *sums)]
