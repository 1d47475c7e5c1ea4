"""Did anything get slower? Two runs, row by row, by a rule that knows their noise.

Each row has the times of several rounds, spread over its run. In logarithms, so that a ratio is a difference:

    change   = median(new) − median(old) − drift
    drift    = median over the controls of median(new) − median(old)
    noise²   = (s_old² + s_new²) / passes + between²
    between  = 1.4826 · median over the controls of |median(new) − median(old) − drift| · (1 + 6 / (controls − 1))
    verdict  = "slower" where change > max(ln 1.05, 4 · noise) and most rounds agree, "faster" where it is below the
               negative of that, "same" otherwise; "unclear" where 4 · noise exceeds ln 1.25, and the rounds did not
               separate

The controls are the rows of plain torch and the machine's ceilings: code that is not cmfast's, measured in the same
rounds. Their median change is the machine's own (clocks, neighbours). How they scatter around it is what differs from
run to run, such as where buffers lie, and no round of one run can show; of few controls, the scatter is widened. s is
the spread of a row's rounds, by their quartiles (a standard deviation is IQR / 1.349; the rounds of one pass share its
moment, hence passes). That most rounds agree means: the quartiles of the two runs, less the drift, do not overlap.

With normal noise 4 standard deviations are passed by 1 row in 16,000. Quartiles of nine rounds, and few controls, make
it one in a few hundred at worst; the tests draw such runs.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Changes below 5 % are not told from the machine's, whatever the noise.
LEAST = math.log(1.05)
#: Standard deviations of noise that a change must pass.
SIGMAS = 4.0
#: A row whose noise hides changes of this ratio is "unclear" rather than "same".
HIDDEN = math.log(1.25)
#: Fewer controls say nothing of what differs from run to run, fewer rounds of a row nothing of its noise: "unclear".
_CONTROLS, _ROUNDS = 5, 4


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a row.

    Attributes:
        key: what tells the row from the others, by column.
        measure: which of its times.
        verdict: "slower", "faster", "same", "unclear", "new", "gone", "broken" (it has no time any more), "mended".
        ratio: new over old, without the machine's own change; None where there is no such pair.
        within: ratios up to this one may be noise.
        control: the row is plain torch's or a ceiling: its verdict is not counted.
    """

    key: Mapping[str, Any]
    measure: str
    verdict: str
    ratio: float | None = None
    within: float | None = None
    control: bool = False

    @property
    def is_worse(self) -> bool:
        """Whether cmfast got slower, or wrong."""
        return not self.control and self.verdict in ("slower", "broken")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The verdicts, and what the controls say of the machine: how many times as long it took, and their scatter."""

    verdicts: list[Verdict]
    drift: float
    between: float
    controls: int


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Compare two documents of `cmfast bench`, read from JSON.

    Raises:
        ValueError: they are of different commands, machines or settings, so that their times say nothing.
    """
    check_comparable(old, new)
    before, after = _by_key(old), _by_key(new)
    passes = min(old["settings"].get("passes", 1), new["settings"].get("passes", 1))
    pairs = {key: (before[key], after[key]) for key in before.keys() & after.keys()}
    controls = [_change(a, b, m) for a, b in pairs.values() if a["control"] for m in _measures(a, b)]
    drift = statistics.median(controls) if controls else 0.0
    between = math.inf
    if len(controls) >= _CONTROLS:
        scatter = 1.4826 * statistics.median(abs(c - drift) for c in controls)
        between = scatter * (1 + 6 / (len(controls) - 1))
    verdicts = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in pairs:
            row = before.get(key) or after[key]
            verdicts.append(Verdict(row["key"], "", "gone" if key in before else "new", control=row["control"]))
            continue
        a, b = pairs[key]
        if bool(a["problem"]) != bool(b["problem"]):
            verdicts.append(Verdict(a["key"], "", "broken" if b["problem"] else "mended", control=a["control"]))
        verdicts += [_judge(a, b, m, drift, between, passes) for m in _measures(a, b)]
    return Comparison(verdicts, math.exp(drift), between, len(controls))


def read(path: Path) -> dict[str, Any]:
    """A document that `cmfast bench ... --json` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        document = json.loads(path.read_text())
        rows = document["rows"]
        assert all({"key", "samples", "problem", "control"} <= row.keys() for row in rows)
        assert {"command"} <= document["settings"].keys()
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError) as error:
        raise ValueError(f"{path} was not written by cmfast bench ... --json") from error
    return document


def check_comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError where two runs are of different commands, machines or settings, so that times say nothing."""
    different = []
    for name in sorted(old["settings"].keys() | new["settings"].keys()):
        before, after = (document["settings"].get(name) for document in (old, new))
        if before != after and name not in _FREE:
            different.append(f"{name} {before} and {after}")
    for name, of in _MACHINE.items():
        before, after = (of(document["environment"]) for document in (old, new))
        if before != after:
            different.append(f"{name} {before} and {after}")
    if different:
        raise ValueError(f"--compare: the runs differ in {'; '.join(different)}: their times say nothing of the code")


#: Settings that choose rows or rounds, or were measured.
_FREE = ("rounds", "passes", "ops", "large", "backends", "peers", "variants", "load_s")
_MACHINE = {
    "processor": lambda facts: facts["processor"]["name"],
    "threads": lambda facts: facts["processor"]["threads"],
    "GPUs": lambda facts: "; ".join(facts["gpus"]) or "none",
    "instruction set": lambda facts: (facts["extensions"]["cpu"] or {}).get("isa", "none"),
}


def _by_key(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {json.dumps(row["key"], sort_keys=True): row for row in document["rows"]}


def _measures(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in old["samples"] if new["samples"].get(name)]


def _logarithms(row: Mapping[str, Any], measure: str) -> list[float]:
    return [math.log(seconds) for seconds in row["samples"][measure]]


def _change(old: Mapping[str, Any], new: Mapping[str, Any], measure: str) -> float:
    return statistics.median(_logarithms(new, measure)) - statistics.median(_logarithms(old, measure))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _judge(
    old: Mapping[str, Any], new: Mapping[str, Any], measure: str, drift: float, between: float, passes: int
) -> Verdict:
    change = _change(old, new, measure) - drift
    before, after = (_quartiles(_logarithms(row, measure)) for row in (old, new))
    if between == math.inf or min(len(row["samples"][measure]) for row in (old, new)) < _ROUNDS:
        return Verdict(old["key"], measure, "unclear", math.exp(change), None, old["control"])
    spreads = [(high - low) / 1.349 for low, high in (before, after)]
    noise = math.sqrt(sum(s * s for s in spreads) / passes + between**2)
    bound = max(LEAST, SIGMAS * noise)
    verdict = "same" if SIGMAS * noise < HIDDEN else "unclear"
    if change > bound and after[0] - drift > before[1]:
        verdict = "slower"
    elif change < -bound and after[1] - drift < before[0]:
        verdict = "faster"
    return Verdict(old["key"], measure, verdict, math.exp(change), math.exp(bound), old["control"])
