import os
import sys

import pytest
import torch
from hypothesis import settings

# The same examples at every run.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

# Without a GPU, Triton's interpreter runs its kernels on CPU tensors; it must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
