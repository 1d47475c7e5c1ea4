"""The rule of `cmfast bench --compare` on runs whose noise is known."""

import json
import math
import random

import pytest

from cmfast.benchmarking.comparison import compare, read

MACHINE = {
    "processor": {"name": "P", "threads": 2},
    "gpus": [],
    "extensions": {"cpu": {"isa": "avx2"}},
}


def document(draw, *, rows=60, controls=40, sigma=0.02, between=0.01, outliers=0.05, drift=0.0, slow=None, passes=3):
    """A run: rounds scatter by sigma, rows from run to run by `between`, and some rounds are hit by something else."""
    found = []
    for i in range(rows + controls):
        here = (i % 7) - 9 + drift + draw.gauss(0, between) + math.log((slow or {}).get(i, 1))
        rounds = [here + draw.gauss(0, sigma) + (draw.random() < outliers) * draw.random() for _ in range(3 * passes)]
        samples = {"cold": [math.exp(x) for x in rounds]}
        found.append({"key": {"row": i}, "samples": samples, "problem": "", "control": i >= rows})
    return {"rows": found, "settings": {"command": "operators", "passes": passes}, "environment": MACHINE}


def verdicts(comparison):
    return {v.key["row"]: v.verdict for v in comparison.verdicts if not v.control}


@pytest.mark.parametrize("controls", [5, 8, 40])
@pytest.mark.parametrize(
    "noise",
    [
        {"sigma": 0.005, "between": 0.0},
        {"sigma": 0.02, "between": 0.01},
        {"sigma": 0.05, "between": 0.03},
        {"sigma": 0.2, "between": 0.1},
    ],
    ids=str,
)
def test_of_ten_pairs_of_one_code_at_most_one_row_in_a_hundred_is_flagged(noise, controls):
    draw, flagged, rows = random.Random(0), 0, 0
    for _ in range(10):
        drift = draw.gauss(0, 0.1)
        pair = document(draw, controls=controls, **noise), document(draw, controls=controls, drift=drift, **noise)
        found = verdicts(compare(*pair))
        flagged += sum(verdict in ("slower", "faster") for verdict in found.values())
        rows += len(found)
    assert rows == 600
    assert flagged <= rows / 100


def test_a_fifth_more_is_found_whatever_the_machine_does():
    draw = random.Random(1)
    for drift in (-0.3, 0.0, 0.3):
        found = compare(document(draw), document(draw, drift=drift, slow={3: 1.2, 5: 1 / 1.2}))
        assert {row for row, verdict in verdicts(found).items() if verdict != "same"} == {3, 5}
        assert (verdicts(found)[3], verdicts(found)[5]) == ("slower", "faster")
        slower = next(v for v in found.verdicts if v.key["row"] == 3)
        assert slower.is_worse
        assert slower.ratio == pytest.approx(1.2, abs=0.05)
        assert 1.05 <= slower.within < slower.ratio
        assert math.log(found.drift) == pytest.approx(drift, abs=0.02)


def test_what_cannot_be_told_is_said():
    draw = random.Random(2)
    found = compare(document(draw, sigma=0.3, between=0.1), document(draw, sigma=0.3, between=0.1, slow={3: 1.2}))
    assert set(verdicts(found).values()) == {"unclear"}
    for few in (document(draw, passes=1), document(draw, controls=4)):
        found = compare(few, few)
        assert set(verdicts(found).values()) == {"unclear"}
        assert found.verdicts[0].within is None


def test_changes_below_five_percent_are_not_told():
    draw = random.Random(3)
    quiet = {"sigma": 0.001, "between": 0.0, "outliers": 0}
    found = verdicts(compare(document(draw, **quiet), document(draw, slow={1: 1.04, 2: 1.06}, **quiet)))
    assert (found[1], found[2]) == ("same", "slower")


def test_controls_are_not_counted():
    draw = random.Random(4)
    quiet = {"sigma": 0.001, "between": 0.001, "outliers": 0}
    found = compare(document(draw, **quiet), document(draw, slow={70: 2.0}, **quiet))
    assert next(v for v in found.verdicts if v.key["row"] == 70).verdict == "slower"
    assert not any(v.is_worse for v in found.verdicts)


def test_rows_that_come_go_and_break():
    draw = random.Random(5)
    old, new = (document(draw, rows=6, sigma=0.005) for _ in range(2))
    del new["rows"][0], old["rows"][1]
    for run, i in ((new, 2), (old, 3)):
        row = next(row for row in run["rows"] if row["key"]["row"] == i)
        row.update(problem="wrong: off by 1", samples={})
    found = compare(old, new)
    assert verdicts(found) == {0: "gone", 1: "new", 2: "broken", 3: "mended", 4: "same", 5: "same"}
    assert [v.key["row"] for v in found.verdicts if v.is_worse] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["settings"].update(dtype="bfloat16"), "dtype None and bfloat16"),
        (lambda run: run["settings"].update(command="model"), "command operators and model"),
        (lambda run: run.update(environment=MACHINE | {"gpus": ["H100"]}), "GPUs none and H100"),
        (lambda run: run.update(environment=MACHINE | {"extensions": {"cpu": None}}), "instruction set avx2 and none"),
        (lambda run: run.update(environment=MACHINE | {"processor": {"name": "P", "threads": 1}}), "threads 2 and 1"),
    ],
)
def test_runs_that_cannot_be_compared(change, message):
    old, new = document(random.Random(0), rows=1), document(random.Random(0), rows=1)
    change(new)
    with pytest.raises(ValueError, match=message):
        compare(old, new)


@pytest.mark.parametrize("text", ["", "{}", '{"rows": [{"a": 1}], "settings": {"command": "x"}}', '{"rows": 3}'])
def test_files_that_are_no_runs(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json was not written by cmfast bench"):
        read(tmp_path / "a.json")
    whole = document(random.Random(0), rows=1)
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert read(tmp_path / "a.json") == whole
