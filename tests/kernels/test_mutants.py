"""Do the tests notice? Each fault of mutants_*.py, seeded into a copy of the package, must fail the tests it names.

A file mutants_<op>.py has MUTANTS: tuples (name, file, old text, new text, expression). The old text occurs once in the
file; the expression selects tests of test_<op>.py as pytest's -k does, or is pytest's arguments where it names a file.
The tests must pass on the copy as it is, and fail by an assertion, not by a crash, with the fault.
"""

import functools
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
MUTANTS = {
    path.stem.removeprefix("mutants_"): runpy.run_path(str(path))["MUTANTS"] for path in HERE.glob("mutants_*.py")
}


def arguments(op, expression):
    return shlex.split(expression) if ".py" in expression else [f"tests/kernels/test_{op}.py", "-k", expression]


@functools.cache
def results(op):
    """For None and the name of each fault: pytest's exit status, the exceptions' types, the end of the output."""
    expressions = list(dict.fromkeys(expression for *_, expression in MUTANTS[op]))
    whole = " or ".join(f"({e})" for e in expressions if ".py" not in e)
    jobs = [(None, arguments(op, whole))] if whole else []
    jobs += [(None, arguments(op, e)) for e in expressions if ".py" in e]
    healthy = len(jobs)
    jobs += [((file, old, new), arguments(op, expression)) for _, file, old, new, expression in MUTANTS[op]]
    # An environment without a GPU, so that a fault cannot hang one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    runner = [sys.executable, str(HERE / "run_mutants.py")]
    done = subprocess.run(runner, input=json.dumps(jobs), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return {None: answers[:healthy], **{m[0]: a for m, a in zip(MUTANTS[op], answers[healthy:], strict=True)}}


@pytest.mark.parametrize("op", MUTANTS)
def test_healthy(op):
    for answer in results(op)[None]:
        assert answer["status"] == 0, answer["log"]


@pytest.mark.parametrize(("op", "name"), [(op, mutant[0]) for op, mutants in MUTANTS.items() for mutant in mutants])
def test_fault_is_caught(op, name):
    answer = results(op)[name]
    assert answer["status"] == 1, answer["log"]
    assert answer["types"] == ["AssertionError"], answer["log"]
