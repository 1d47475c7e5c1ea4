"""What this machine is and what cmfast can use of it; nothing here raises."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .kernels import backend_report, native

_PACKAGES = ("cmfast", "torch", "triton", "numpy", "safetensors")


def describe() -> dict[str, Any]:
    """Versions, processor, GPUs, clocks, commit, extensions; for each backend and operator "yes" or why not."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "commit": commit(),
        "system": platform.platform(),
        "processor": {
            "name": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": _gpus(),
        "clocks": _clocks(),
        "extensions": {"cpu": _extension(native.cpu), "cuda": _extension(native.cuda)},
        "backends": backend_report(),
    }


def _extension(load: Callable[[], ModuleType]) -> dict[str, str] | None:
    """For what and with which compilers an extension was built; None where it was not."""
    try:
        return load().build_info()
    except ImportError:
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name, with the numbers that tell generations of one name apart where the system has them."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        text = ""
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{name} ({numbers})" if numbers else name


def _gpus() -> list[str]:
    try:
        count = torch.cuda.device_count()
        return [_gpu(i) for i in range(count)]
    except RuntimeError as error:
        return [f"unusable: {error}"]


def _gpu(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    return f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors, {p.major}.{p.minor}"


def _clocks() -> dict[str, str]:
    """The clocks as they are at this moment, of the processor and of the GPUs; none where the system does not say."""
    found = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    if clocks := [float(value) for value in re.findall(r"^cpu MHz\s*: ([\d.]+)$", text, re.MULTILINE)]:
        found["processor"] = f"{min(clocks):.0f} to {max(clocks):.0f} MHz"
    with contextlib.suppress(OSError):  # a virtual machine's host has it
        found["governor"] = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            found["gpus (sm, memory, most sm, power, temperature)"] = "; ".join(done.stdout.strip().splitlines())
    return found


def commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
