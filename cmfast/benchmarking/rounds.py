"""Rows, and the turns in which they are measured: a slow moment of the machine falls on all of them alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .devices import Timer, Times


@dataclasses.dataclass
class Row:
    """What is measured of one candidate.

    Attributes:
        key: what tells it from the others, by column.
        facts: what else is known of it, by column.
        samples: seconds of a call, one a round, by what was measured ("cold", "warm").
        problem: why it has no times: a wrong result, or that another backend served it.
        control: it is not of cmfast: its changes are the machine's.
    """

    key: dict[str, Any]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    problem: str = ""
    control: bool = False

    def fail(self, problem: str) -> None:
        """A row that is not what it says has no times, also not those that it had."""
        self.problem = problem
        self.samples.clear()

    def times(self, measure: str) -> Times | None:
        """Median and quartiles of the rounds; None where nothing was measured."""
        found = self.samples.get(measure)
        return Times.of(found) if found else None

    def flat(self) -> dict[str, Any]:
        """The row's columns."""
        row = {**self.key, **self.facts}
        for measure, found in self.samples.items():
            times = Times.of(found)
            row |= {f"{measure}_s": times.median, f"{measure}_low_s": times.low, f"{measure}_high_s": times.high}
            row["rounds"] = len(found)
        return row | {"problem": self.problem}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row and what times it."""

    row: Row
    timers: Mapping[str, Timer]


def take_turns(candidates: Sequence[Candidate], rounds: int, first: int = 0) -> None:
    """Measure each candidate once a round; each round begins with another, the first one with number `first`."""
    for i in range(rounds):
        start = (first + i) % max(len(candidates), 1)
        for candidate in [*candidates[start:], *candidates[:start]]:
            for measure, timer in candidate.timers.items():
                seconds = timer.turn()  # which Ctrl-C may end
                candidate.row.samples.setdefault(measure, []).append(seconds)
