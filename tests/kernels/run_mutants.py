"""Run an operator's tests on copies of the package with a seeded fault each, for test_mutants.py: JSON in, JSON out.

The heavy imports are made once, and each run is a fork with its own copy first on the path.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
import triton.experimental.gluon  # noqa: F401 - the interpreter imports it at its first launch

ROOT = Path(__file__).parents[2]
SECONDS = 120


class Failures:
    """A pytest plugin that keeps the types of the exceptions that tests ended with."""

    def __init__(self):
        self.types = []

    def pytest_exception_interact(self, call):
        error = call.excinfo
        self.types.append("AssertionError" if issubclass(error.type, AssertionError) else repr(error.value))


def copy(tree):
    """The package as it is installed, and its tests."""
    ignored = shutil.ignore_patterns("__pycache__", "assets", "fixtures")
    for source, target in (("cmfast", "cmfast"), ("kernels", "cmfast/kernels"), ("tests", "tests")):
        shutil.copytree(ROOT / source, tree / target, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)


def mutate(tree, file, old, new):
    path = tree / ("cmfast" if file.startswith("kernels/") else "") / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times, not once: {old!r}")
    path.write_text(text.replace(old, new))


def run_tests(tree, arguments):
    """In a fork: the exit status of pytest and the exceptions of the tests."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    signal.alarm(SECONDS)
    import cmfast.kernels

    assert Path(cmfast.kernels.__file__).is_relative_to(tree), "the tests would import another copy"
    failures = Failures()
    options = ["-x", "-q", "--import-mode=importlib", "-o", "addopts="]
    without = [option for name in ("cacheprovider", "benchmark", "cov") for option in ("-p", f"no:{name}")]
    status = pytest.main([*options, *without, *arguments], plugins=[failures])
    return {"status": int(status), "types": failures.types}


def run(fault, arguments):
    """Test a copy with the fault (file, old text, new text), or none."""
    with tempfile.TemporaryDirectory() as folder:
        tree, answer, log = Path(folder, "tree"), Path(folder, "answer"), Path(folder, "log")
        tree.mkdir()
        copy(tree)
        try:
            if fault:
                mutate(tree, *fault)
        except ValueError as error:
            return {"status": -1, "types": [], "log": str(error)}
        process = os.fork()
        if not process:
            with log.open("w") as out, contextlib.suppress(BaseException):
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                try:
                    answer.write_text(json.dumps(run_tests(tree, arguments)))
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        result = json.loads(answer.read_text()) if answer.exists() else {"status": -status, "types": ["no answer"]}
        return {**result, "log": log.read_text()[-3000:]}


if __name__ == "__main__":
    json.dump([run(fault, arguments) for fault, arguments in json.load(sys.stdin)], sys.stdout)
