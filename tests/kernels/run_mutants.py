"""Run an operator's tests on copies of the package with a seeded fault each, for test_mutants.py: JSON in, JSON out."""

import json
import sys
from pathlib import Path

import hypothesis  # noqa: F401 - what the tests import is imported once
import numpy  # noqa: F401
import torch  # noqa: F401
import triton.experimental.gluon  # noqa: F401 - the interpreter imports it at its first launch

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import Fork

SECONDS = 120


def mutate(tree, file, old, new):
    path = tree / ("cmfast" if file.startswith("kernels/") else "") / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times, not once: {old!r}")
    path.write_text(text.replace(old, new))


def run(fault, arguments):
    """Test a copy with the fault (file, old text, new text), or none."""
    try:
        return Fork.start(lambda tree: fault and mutate(tree, *fault), arguments, SECONDS).result()
    except ValueError as error:
        return {"status": -1, "types": [], "log": str(error)}


if __name__ == "__main__":
    json.dump([run(fault, arguments) for fault, arguments in json.load(sys.stdin)], sys.stdout)
