"""Stage f: the operators' own tests on the device, most telling first; then compute-sanitizer on a handful of them."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

from . import stage
from .supervisor import ROOT

#: name: pytest's arguments, the most telling first
SUITES = {
    "convolution": [
        *(f"tests/kernels/test_{op}.py" for op in ("conv", "conv_cuda", "moments", "apply_group_norm")),
        *("-k", "cuda or triton"),
    ],
    "engine": ["tests/engine/cuda"],
    "group norm": ["tests/kernels/test_group_norm.py", "-k", "cuda or triton"],
    "attention": ["tests/kernels/test_attention.py", "-k", "cuda or triton"],
    "consistency step": ["tests/kernels/test_consistency.py", "tests/kernels/test_philox.py", "-k", "cuda or triton"],
    "backends": ["tests/kernels/test_backends.py", "tests/kernels/test_group_norm_cuda.py"],
    "model": ["tests/test_model.py", "tests/test_unet.py", "tests/sampling"],
}
DRY_SUITES = {
    "group norm": ["tests/kernels/test_group_norm.py", "-k", "(cuda-0 or triton) and test_shapes and N2-C12-G3"]
}
_KINDS = ("PASSED", "FAILED", "ERROR", "SKIPPED")
#: A line of `pytest -v` by a worker of pytest-xdist, or without it.
_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] .*?(?P<kind>{0}) (?P<test>tests/.+?) *$|(?P<name>tests/.+?) (?P<verdict>{0})(?: |$))".format(
        "|".join(_KINDS)
    ),
    re.MULTILINE,
)
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: What runs under compute-sanitizer, which slows it many times: a few small cases of every operator.
SANITIZED = [
    "tests/kernels/test_group_norm.py",
    "tests/kernels/test_attention.py",
    "tests/kernels/test_consistency.py",
    "tests/kernels/test_conv.py",
    "-k",
    "cuda and test_shapes and (N3-C10 or N1-H1-T65 or N1-C32-1x1) or cuda and test_gradients and N1-H1-T65"
    " or cuda and test_sixteen_bit_products and (odd-l or pair-l)",
]


def cases(device, folder, until):
    """The suites, then each tool of compute-sanitizer."""
    for name, arguments in (DRY_SUITES if device.emulated else SUITES).items():
        work = lambda a=(f"tests of {name}", arguments): [suite(*a, folder, until)]  # noqa: E731
        yield stage.Case(f"tests of {name}", work, patience=600)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield stage.Case("compute-sanitizer", lambda: [{"suite": "compute-sanitizer", "note": "it is not installed"}])
    for tool in TOOLS if sanitizer and not device.emulated else ():
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        work = lambda a=(f"compute-sanitizer {tool}", SANITIZED, folder, until, command): [suite(*a)]  # noqa: E731
        yield stage.Case(f"compute-sanitizer {tool}", work, patience=600)


def suite(name: str, arguments: list[str], folder, until: float, sanitizer: list[str] | None = None) -> dict:
    """A row: how many tests passed and failed until the time was up, and the names of those that failed."""
    # pytest-benchmark may not be there, and its option in pyproject.toml would be an error.
    command = [*(sanitizer or []), sys.executable, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib", *arguments]
    if sanitizer is None and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(os.cpu_count() or 1, 12))]
    # Under the sanitizer without the caching allocator of torch, which would hide what lies outside a tensor.
    environment = {} if sanitizer is None else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(max(until - time.time(), 1))
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
    said = log.read_text(errors="replace")
    pairs = {(match["kind"] or match["verdict"], match["test"] or match["name"]) for match in _OUTCOME.finditer(said)}
    counts = {what.lower(): sum(kind == what for kind, _ in pairs) for what in _KINDS}
    failures = sorted({test for kind, test in pairs if kind in ("FAILED", "ERROR")})
    row = {"suite": name, **counts, "failures": failures[:100], "complete": status is not None}
    if failures or status not in (0, None):
        last = next((line for line in reversed(said.strip().splitlines()) if line.strip("= ")), "it said nothing")
        first = f"; the first is {failures[0]}" if failures else ""
        row["error"] = f"{'stopped' if status is None else f'exit status {status}'}: {last.strip('= ')}{first}"
    return row


if __name__ == "__main__":
    stage.main("conformance", cases)
