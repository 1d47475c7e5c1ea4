"""Tests of a copy of the package, each run in a fork: the heavy imports are made once."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Failures:
    """A pytest plugin that keeps the types of the exceptions that tests ended with, and the first such test."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.first = ""

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        error = call.excinfo
        self.types.append("AssertionError" if issubclass(error.type, AssertionError) else repr(error.value))
        self.first = self.first or node.nodeid


def copy(tree: Path) -> None:
    """The package as it is installed, and its tests, compiled or not. What is large and no source is linked to."""
    for source, target in (("cmfast", "cmfast"), ("kernels", "cmfast/kernels"), ("tests", "tests")):
        shutil.copytree(ROOT / source, tree / target, ignore=shutil.ignore_patterns("*.pyc.*", *_LINKED))
        for pattern in _LINKED:
            for path in (ROOT / source).glob(pattern):
                (tree / target / path.name).symlink_to(path)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "benchmarks").symlink_to(ROOT / "benchmarks")  # the static figures that tests compare with


_LINKED = ("*.so", "assets", "fixtures")


@dataclasses.dataclass
class Fork:
    """A run of tests on a copy that `change` was made to: `result` waits for it and may be asked for once."""

    process: int
    folder: tempfile.TemporaryDirectory

    @classmethod
    def start(cls, change: Callable[[Path], None], arguments: Sequence[str], seconds: float) -> "Fork":
        """Copy the package, change the copy, and run pytest with the arguments for no longer than that."""
        folder = tempfile.TemporaryDirectory()
        tree = Path(folder.name, "tree")
        tree.mkdir()
        copy(tree)
        try:
            change(tree)
        except BaseException:
            folder.cleanup()
            raise
        sys.stdout.flush()
        process = os.fork()
        if not process:
            with Path(folder.name, "log").open("w") as out, contextlib.suppress(BaseException):
                os.setpgid(0, 0)
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                try:
                    answer = _run_tests(tree, arguments, seconds)
                    Path(folder.name, "answer").write_text(json.dumps(answer))
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    sys.stdout.flush()
            os._exit(0)
        return cls(process, folder)

    def result(self, status: int | None = None) -> dict[str, Any]:
        """pytest's exit status, the exceptions' types, the first test that failed, and the end of the output.

        `status` is that of the process where it has been waited for. Where it was killed, by the clock or a fault, the
        exit status is the signal's number, negative.
        """
        if status is None:
            _, status = os.waitpid(self.process, 0)
        with contextlib.suppress(ProcessLookupError):  # what the tests have started and left
            os.killpg(self.process, signal.SIGKILL)
        with self.folder as folder:
            answer, log = Path(folder, "answer"), Path(folder, "log")
            killed = {"status": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1, "types": [], "first": ""}
            result = json.loads(answer.read_text()) if answer.exists() else killed
            return {**result, "log": log.read_text(errors="replace")[-3000:]}


def _run_tests(tree: Path, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    signal.alarm(max(1, round(seconds)))
    import cmfast.kernels

    assert Path(cmfast.kernels.__file__).is_relative_to(tree), "the tests would import another copy"
    failures = Failures()
    options = ["-x", "-q", "--tb=short", "--import-mode=importlib", "-o", "addopts="]
    without = [option for name in ("cacheprovider", "benchmark", "cov", "xdist") for option in ("-p", f"no:{name}")]
    status = pytest.main([*options, *without, *arguments], plugins=[failures])
    return {"status": int(status), "types": failures.types, "first": failures.first}
