import ast
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


#: The rooms of DESIGN, from the ground up; `__init__` is on top of all.
ROOMS = [
    "kernels",
    "noise",
    "unet",
    "sampling",
    "preconditioning",
    "files",
    "model",
    "checkpoints",
    "environment",
    "engine",
    "pipelines",
    "accelerate",
    "pictures",
    "evaluation",
    "training",
    "cli",
]
#: A method that stands for a function of a room above: `model.save(path)` is `cmfast.save(model, path)`.
EXCEPTIONS = {("model", "checkpoints")}


def imported(path):
    """(dots, target) of each relative import of a file, wherever it stands: target is a module's dotted path."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


@pytest.mark.parametrize("package", ["cmfast", "kernels"])
def test_imports_run_one_way(package):
    """The order of DESIGN: no module imports from a room above its own."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        for dots, target in imported(path):
            assert dots <= len(parts), f"{path} imports from outside its package: {target}"
            if package == "cmfast" and dots == len(parts) and parts[0] != "__init__":
                room, other = parts[0], target.split(".")[0]
                assert {room, other} <= set(ROOMS), f"{path}: {room} or {other} is no room"
                if ROOMS.index(other) > ROOMS.index(room):
                    found.add((room, other))
    assert found == (EXCEPTIONS if package == "cmfast" else set())


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("from . import a, b\nfrom ..c.d import e\ndef f():\n    from .g import h\nimport os\n")
    assert sorted(imported(path)) == [(1, "a"), (1, "b"), (1, "g"), (2, "c.d")]


def test_the_engine_has_no_circles():
    """Within a package too: a file is imported after what it imports."""
    edges = {}
    for path in (ROOT / "cmfast" / "engine").rglob("*.py"):
        parts = path.relative_to(ROOT / "cmfast" / "engine").with_suffix("").parts
        if parts == ("__init__",):
            continue
        home = ".".join(parts).removesuffix(".__init__")
        edges[home] = set()
        for dots, target in imported(path):
            base = parts[:-dots] if dots <= len(parts) else None
            if base is not None:
                edges[home].add(".".join((*base, target)))
    left = dict(edges)
    while left:
        free = {name for name, targets in left.items() if not targets & left.keys() - {name}}
        assert free, f"these import one another: {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}
