"""The programs in examples/ run as they stand."""

import subprocess
import sys
from pathlib import Path

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
