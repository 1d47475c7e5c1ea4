"""The CUDA kernels on the CPU: the module _emulated, compiled on first use and kept in build/.

CMFAST_SANITIZE=1 takes the build with the address and undefined-behaviour sanitizers (see `make sanitize`).
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: In order, reversed, and drawn: see csrc/emulation/scheduler.h.
SCHEDULES = (0, 1, 2)


@functools.cache
def toolchain() -> ModuleType:
    """csrc/toolchain.py, which is part of no package."""
    return load("toolchain", ROOT / "csrc" / "toolchain.py")


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def missing() -> str:
    """Why there is no emulation here, or nothing."""
    if not (ROOT / "csrc").exists():
        return "the sources of the CUDA kernels are not here"
    if importlib.util.find_spec("pybind11") is None:
        return 'pybind11 is not installed: pip install "cmfast[dev]"'
    try:
        found = toolchain().find_host_compiler()
    except FileNotFoundError as error:
        return str(error)
    return "" if found else "no host compiler was found: install g++, or name one in CXX"


def folder() -> Path:
    """Where the build is kept."""
    return ROOT / "build" / ("sanitized" if sanitizes() else "emulated")


def sanitizes() -> bool:
    """Whether the build is the one with the sanitizers."""
    return os.environ.get("CMFAST_SANITIZE") == "1"


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one of the processes that run the tests build in the folder; the others wait, and find what it built."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def cpu_kernels(check: str) -> ModuleType:
    """A build of the CPU kernels with a check of csrc/toolchain.py: seeded faults in it, or sanitizers."""
    return load("_cpu", cpu_module(check))


def cpu_module(check: str) -> Path:
    folder = ROOT / "build" / f"cpu-{check.replace(',', '-')}"
    target = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    with one_at_a_time(folder):
        toolchain().build_cpu(target, folder / "objects", toolchain().find_host_compiler(), check=check)
    return target


@functools.cache
def emulated() -> ModuleType:
    """The module, built from the sources as they are. A source that does not compile is an error."""
    target = folder() / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with one_at_a_time(folder()):
        toolchain().build_emulation(target, folder(), sanitize=sanitizes())
    return load("_emulated", target)
