import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# `python -m pytest` puts this folder's parent on the path, where transformers would take kernels/ for the package of
# that name and import it.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.parent]

# The same examples at every run.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

#: Files whose tests take minutes. They come first, so that no process is left with one when the others have ended.
_LONG = (
    "test_conv.py",
    "test_mutants.py",
    "test_gpu_check.py",
    "test_group_norm.py",
    "test_families.py",
    "test_peers.py",
    "test_cpu_faults.py",
)

# Without a GPU, Triton's interpreter runs its kernels on CPU tensors; it must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture
def cmfast(monkeypatch, capsys):
    """Run the command; gives (exit status, standard output, standard error)."""

    from cmfast.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cmfast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:  # typer ends every command with one
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run
