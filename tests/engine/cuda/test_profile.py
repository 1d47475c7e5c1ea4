"""`cmfast profile` of a network that the target for GPUs evaluates."""

import json
import sys
import textwrap

FILE = textwrap.dedent(
    """
    import torch
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Tanh())

    def call():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return net.to(device), (torch.randn(1, 3, 6, 6, device=device),)
    """
)


def test_steps_and_passes(cmfast, tmp_path):
    path = tmp_path / "small.py"
    path.write_text(FILE)
    arguments = ("--rounds", 1, "--explain", "--passes", "--json", tmp_path / "steps.json")
    try:
        status, out, _ = cmfast("profile", "--from", f"{path}:call", *arguments)
    finally:
        sys.modules.pop("small", None)
    assert status == 0
    assert "kernels: 2 x conv2d, 1 x apply_group_norm" in out
    assert "torch: 1 x aten.tanh, the GPU kernels have no such operator" in out
    assert "without written_norms: " in out
    assert "without convolutions: " in out
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [(row["operator"], row["layer"]) for row in rows] == [
        ("copies of inputs", ""),
        ("conv2d", "0"),
        ("apply_group_norm", "1"),
        ("conv2d", "3"),
        ("aten.tanh", "4"),
        ("copies of outputs", ""),
        ("python", ""),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["operations"] for row in rows if row["name"]] == [2 * 8 * 16 * 27, 0, 2 * 4 * 4 * 72, 0]
