"""The programs in examples/ run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from .tiny_pipelines import pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    found = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_lcm_pipeline(tmp_path):
    pipeline(tiny=True).save_pretrained(tmp_path / "model")
    out = tmp_path / "image.png"
    printed = run("lcm_pipeline.py", "a cat", "--model", tmp_path / "model", "--steps", "2", "--out", out)
    assert "pixels differ by 0.00 of 255 at most" in printed
    assert Image.open(out).size == (16, 16)


def test_diffusers_network(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    diffusers.UNet2DModel(sample_size=16, **blocks, **types).save_pretrained(tmp_path / "model")
    printed = run("diffusers_network.py", "--model", tmp_path / "model", "--rounds", "1").splitlines()
    assert printed[0].startswith("UNet2DModel of ")
    assert float(printed[1].split()[2]) < 1e-5
    assert float(printed[-1].split()[-1]) < 1e-5


def test_your_own_network():
    printed = run("your_own_network.py", "--steps", "2").splitlines()
    assert all(float(line.split()[-1]) < 1e-4 for line in printed[:2])
    assert printed[2] == "samples: [4, 3, 32, 32]"
