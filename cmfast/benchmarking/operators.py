"""The operators at the networks' shapes: each backend that serves them, beside plain torch.

A result is compared with float64 before it is timed, and at every pass the backend's own launches show that it served
the call. Candidates take turns, in rounds, and all calls are gone through several times (passes), so that the rounds of
a row are spread over the whole run.

"cold" is a call whose inputs are not in the last cache: so many buffers take turns that together they are twice its
size. "warm" is a call on the same buffers again. Outputs are allocated by each call, as in a network. On a GPU, both
are replays of a CUDA graph.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..kernels import BackendError
from ..kernels.shapes import Call
from . import calls, plain_torch
from .accuracy import WrongResultError, check_alike, judge, judge_plain
from .ceilings import ceilings, floor_seconds
from .devices import Device, Position
from .rounds import Candidate, Row, take_turns
from .serving import backends_of, launched, prepared, run_watched

#: What a row that is no backend's is called.
TORCH = "torch"
#: Buffers of a call, at most; and calls of a graph, at least.
MOST, GRAPH = 256, 20


class Operators:
    """A measurement of calls, whose rows can be read at any time.

    Attributes:
        ceilings: rows of what the machine can do at most, by their names.
        rows: those of the calls.
    """

    def __init__(
        self, chosen: Sequence[Call], device: Device, *, backends: Sequence[str] | None = None, rounds: int = 3
    ) -> None:
        """Take calls.

        `backends` are those to measure; by default all that serve a call with kernels, the reference where none does,
        and TORCH. `rounds` are those of a pass.
        """
        self.chosen, self.device, self.backends, self.rounds = chosen, device, backends, rounds
        self.ceilings: dict[str, Row] = {}
        self._rows: dict[tuple[str, str], Row] = {}
        self._passes = 0

    @property
    def rows(self) -> list[Row]:
        """The rows of the calls that were measured or failed, with their share of the ceiling."""
        found = [row for row in self._rows.values() if row.samples or row.problem]
        for row in found:
            self._add_rates(row)
        return found

    @property
    def steps(self) -> int:
        """How often a pass yields."""
        return 1 + len(self.chosen)

    def measure(self) -> Iterator[str]:
        """One pass: yield the name of what was measured, each time that something was."""
        dtypes = sorted({call.dtype for call in self.chosen})
        for candidate in ceilings(self.device, dtypes, self.ceilings):
            take_turns([candidate], self.rounds)
            self.device.free()
        yield "ceilings"
        for call in self.chosen:
            self._measure(call)
            self.device.free()
            yield calls.name(call)
        self._passes += 1

    @torch.no_grad()
    def _measure(self, call: Call) -> None:
        given = calls.values(call, self.device.name)
        moved = calls.bytes_moved(call, given)
        names = [*self._backends_of(call, given), TORCH]
        sets = [given]
        enough = 1 if moved > 2 * self.device.cache_bytes else -(-2 * self.device.cache_bytes // moved) + 1
        least = GRAPH if self.device.name == "cuda" else 1
        count = min(MOST, max(least, enough), max(2, (8 << 30) // moved))
        sets += [calls.copied(given) for _ in range(count - 1)]
        position, candidates = Position(), []
        for name in names:
            row = self._row(call, name, moved, count)
            if row.problem:
                continue
            try:
                runs = self._ready(call, name, sets, row)
            except (WrongResultError, BackendError) as error:
                kind = "wrong" if isinstance(error, WrongResultError) else "void"
                row.fail(f"{kind}: {error}")
                continue
            timers = {"cold": self.device.timer(runs, position)}
            if enough > 1:
                timers["warm"] = self.device.timer([runs[0]] * least, Position())
            candidates.append(Candidate(row, timers))
        take_turns(candidates, self.rounds, first=self._passes * self.rounds)

    def _backends_of(self, call: Call, given: tuple[Any, ...]) -> list[str]:
        found = backends_of(call, given)
        if self.backends is not None:
            return [name for name in found if name in self.backends]
        return found[:-1] or found

    def _row(self, call: Call, name: str, moved: int, count: int) -> Row:
        facts = {"bytes": moved, "flops": sum(call.flops), "buffers": count, "error": None}
        key = {**calls.fields(call), "backend": name}
        return self._rows.setdefault((calls.name(call), name), Row(key, facts, control=name == TORCH))

    def _ready(self, call: Call, name: str, sets: Sequence[tuple[Any, ...]], row: Row) -> list[Callable[[], Any]]:
        """The call on each set of buffers, once its result is known to be right and the backend's own."""
        if name == TORCH:
            given, runs = sets[0], [plain_torch.in_torch(call, given) for given in sets]
            if row.facts["error"] is None:
                row.facts["error"] = judge_plain(call, given, runs[0]())
            return runs
        ready = [prepared(call, given, name) for given in sets]
        runs = [launched(call, name, given) for given in ready]
        result = run_watched(name, runs[0])
        if row.facts["error"] is None:
            row.facts["error"] = judge(call, ready[0], result)
            if name == "cpu":
                check_alike(runs[0](), result)
        return runs

    def _add_rates(self, row: Row) -> None:
        times = row.times("cold")
        if times is None:
            return
        row.facts["gb_per_s"] = row.facts["bytes"] / times.median / 1e9
        row.facts["gflop_per_s"] = row.facts["flops"] / times.median / 1e9
        key = row.key
        floor = floor_seconds(key["op"], key["dtype"], row.facts["bytes"], row.facts["flops"], self.ceilings)
        row.facts["share"] = None if floor is None else floor / times.median
