import ast
import json
import os
import subprocess
import sys
from importlib import metadata
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
heavy = {"triton", "matplotlib", "PIL", "typer", "rich", "tqdm", "sklearn", "diffusers", "huggingface_hub"}
import torch
before = set(sys.modules)
import cmfast, cmfast.engine.cuda.plan
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
    "modes",
    "pooling",
    "unet",
    "sampling",
    "preconditioning",
    "files",
    "finite",
    "sound",
    "checkpoints",
    "storage",
    "model",
    "environment",
    "engine",
    "pipelines",
    "replay",
    "accelerate",
    "explain",
    "profiling",
    "profile",
    "pictures",
    "bulk",
    "serving",
    "evaluation",
    "benchmarking",
    "training",
    "cli",
    "__main__",
]


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
    assert not found


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("from . import a, b\nfrom ..c.d import e\ndef f():\n    from .g import h\nimport os\n")
    assert sorted(imported(path)) == [(1, "a"), (1, "b"), (1, "g"), (2, "c.d")]


def imports_of(package):
    """For each module of a package by its dotted path, the package's modules that it imports."""
    files = {path.relative_to(package).with_suffix("").parts: path for path in package.rglob("*.py")}
    modules = {parts[:-1] if parts[-1] == "__init__" else parts: path for parts, path in files.items()}
    edges = {name: set() for name in modules}
    for parts, path in files.items():
        home = parts[:-1] if parts[-1] == "__init__" else parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(parts):
                base = (*parts[: -node.level], *(node.module.split(".") if node.module else ()))
                for alias in node.names:
                    target = (*base, alias.name)
                    if target != ("kernels",):  # a mapping of a folder beside the package
                        edges[home] |= {target if target in modules else base} & modules.keys()
    return edges


def circles(edges):
    """The modules that import one another, or lie between such."""
    left = {name: set(targets) for name, targets in edges.items()}
    while left:
        wanted = set().union(*left.values())
        kept = {name for name, targets in left.items() if targets and name in wanted}
        if kept == left.keys():
            break
        left = {name: left[name] & kept for name in kept}
    return {".".join(name) for name in left}


def test_no_modules_import_one_another():
    """Within a room too, wherever an import stands: what is for the type checker alone counts."""
    edges = imports_of(ROOT / "cmfast")
    assert ("checkpoints", "openai") in edges["checkpoints", "formats"]  # by a name of the package
    assert ("training", "loop") in edges[("training",)]
    assert not circles(edges)


def test_circles_are_found(tmp_path):
    (tmp_path / "room").mkdir()
    for name, text in {
        "__init__": "from .a import x\n",
        "a": "from .room import b\n",
        "c": "from .a import x\n",
        "room/__init__": "from .b import y\n",
        "room/b": "def f():\n    from ..a import x\n",
        "room/d": "from . import y\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert {"a", "room.b"} <= circles(imports_of(tmp_path))
    (tmp_path / "room" / "b.py").write_text("import a\n")
    assert circles(imports_of(tmp_path)) == set()
    (tmp_path / "room" / "b.py").write_text("from . import y\n")
    assert {"room", "room.b"} <= circles(imports_of(tmp_path))


def test_the_command_is_the_packages():
    result = subprocess.run([sys.executable, "-m", "cmfast", "--version"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == metadata.version("cmfast")
