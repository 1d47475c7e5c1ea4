import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env, cwd="/", timeout=120
    )


def test_import_needs_torch_numpy_and_safetensors_only():
    code = """
import sys, json, builtins
real = builtins.__import__
allowed = {"torch", "numpy", "safetensors", "cmfast"}
heavy = {"triton", "matplotlib", "PIL", "typer", "rich", "tqdm", "sklearn", "diffusers"}
import torch
before = set(sys.modules)
import cmfast
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new & heavy)))
"""
    assert json.loads(python(code).stdout) == []


def test_import_is_fast():
    """Under 1.5 s on top of torch's own import: the best of three, since machines are noisy."""
    code = "import torch, time; t = time.perf_counter(); import cmfast; print(time.perf_counter() - t)"
    assert min(float(python(code).stdout) for _ in range(3)) < 1.5


def test_kernels_refuses_another_name():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    result = python(code)
    assert result.returncode != 0
    assert "this folder is the package cmfast.kernels" in result.stderr


def test_python_at_the_root_still_finds_the_package():
    result = subprocess.run(
        [sys.executable, "-c", "import cmfast.kernels; print(cmfast.kernels.__name__)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.stdout.strip() == "cmfast.kernels"


@pytest.mark.parametrize("package", ["cmfast", "kernels"])
def test_imports_run_one_way(package):
    """The order of DESIGN: no module imports from a room above its own."""
    order = [
        "kernels",
        "noise",
        "unet",
        "sampling",
        "preconditioning",
        "files",
        "model",
        "checkpoints",
        "environment",
        "pictures",
        "evaluation",
        "training",
        "cli",
    ]
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        room = "kernels" if package == "kernels" else parts[0]
        if room not in order:
            continue
        depth = len(parts) - 1
        for line in path.read_text().splitlines():
            words = line.split()
            if not line.startswith("from .") or len(words) < 4:
                continue
            dots = len(words[1]) - len(words[1].lstrip("."))
            if package == "cmfast" and dots == depth + 1:
                target = words[1].lstrip(".").split(".")[0]
                if target in order:
                    assert order.index(target) <= order.index(room), f"{path}: {line}"
            assert dots <= depth + 1, f"{path} imports from outside its package: {line}"
