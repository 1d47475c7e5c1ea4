"""The comparison with other projects (benchmarks/peers), as far as it needs none of them."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast.benchmarking.plain_network import plain_operators

from .fixture_files import network

ROOT = Path(__file__).parent.parent


class Operators(TorchDispatchMode):
    """Notes the namespaces of the operators that run."""

    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.namespaces.add(operator.namespace)
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["unet_classcond_film_resblockupdown", "unet_uncond_addemb_resblockupdown"])
def test_the_plain_network_is_the_published_one(name):
    unet, data = network(name)
    with torch.no_grad(), plain_operators(), Operators() as operators:
        output = unet(data["x"], data["timesteps"], data.get("y"))
    assert operators.namespaces == {"aten"}
    assert (output - data["output"]).norm() < 1e-5 * data["output"].norm()
    with torch.no_grad(), Operators() as operators:
        unet(data["x"], data["timesteps"], data.get("y"))
    assert "cmfast" in operators.namespaces


def compare(folder, *options):
    """The rows of a run on the digits, by peer."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers.compare",
        "--network",
        "digits",
        "--threads",
        "1",
        "--rounds",
        "1",
    ]
    command += ["--files", str(folder), "--csv", str(folder / "rows.csv"), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    with (folder / "rows.csv").open() as file:
        rows = {row["peer"]: row for row in csv.DictReader(file)}
    assert all(f"| {peer} |" in result.stdout for peer in rows)
    return rows


def test_peers_on_the_digits(tmp_path):
    rows = compare(tmp_path, "--dtype", "bf16", "--batch", "2", "--peers", "torch", "onnxruntime")
    torch_row, missing = rows["torch"], rows["onnxruntime"]
    assert 0 < float(torch_row["error"]) < 0.05
    assert float(torch_row["seconds"]) > 0
    assert float(torch_row["ratio"]) == 1
    assert float(torch_row["memory"]) > 0.05
    assert not missing["seconds"]
    assert missing["note"]  # not installed, or no bfloat16: said either way

    reference = tmp_path / "digits-batch2" / "reference.npy"
    np.save(reference, np.load(reference) + 1)
    row = compare(tmp_path, "--dtype", "bf16", "--batch", "2", "--peers", "torch")["torch"]
    assert row["note"] == "its output is wrong"
    assert float(row["error"]) > 0.1
    assert not row["seconds"]
