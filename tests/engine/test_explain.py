"""`cmfast.explain`: what the engine did of a call, and what it left to torch and why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cmfast
from cmfast.engine.passes import PASSES

from .tiny_pipelines import pipeline


class Block(nn.Module):
    """A group norm and two convolutions, one of which the kernels lack."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv, self.grouped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x):
        return self.grouped(self.conv(F.silu(self.norm(x))))


class Chooses(nn.Module):
    """Its course depends on values; its block's does not."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else self.block(-x)


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Chooses()

    def forward(self, x, times=1):
        for _ in range(times):
            x = self.first(x) + torch.randn_like(x)
        return self.second(x)


X = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_network_that_is_captured_as_a_whole():
    found = cmfast.explain(cmfast.accelerate(Block()), X)
    assert found.captured == {"": 1}
    assert found.left == {}
    assert found.kernels["conv2d"] == 1
    ((operator, reason),) = found.torch
    assert "conv" in operator
    assert reason
    assert found.torch[operator, reason] == 1
    assert found.passes["group_norms"] == 1
    assert found.passes["resampling"] == 0
    assert found.passes.keys() == PASSES.keys()  # and none of another device
    assert found.value_bytes > 0
    assert found.weight_bytes >= 8 * 8 * 9 * 4
    lines = str(found).splitlines()
    assert lines[0] == "captured: the network as a whole"
    assert any(line.startswith("kernels: 1 x ") or line.startswith("kernels: 2 x ") for line in lines)
    assert f"torch: 1 x {operator}, {reason}" in lines
    assert any(line.startswith("group_norms: 1 times. A group norm before convolutions") for line in lines)
    assert any(line.startswith("passes with nothing to do: ") and "resampling" in line for line in lines)
    assert lines[-1].startswith("memory: ")


def test_a_network_that_runs_in_its_parts():
    fast = cmfast.accelerate(Draws())
    for times in (1, 3):
        found = cmfast.explain(fast, X, times=times)
        assert found.captured == {"first": times, "second.block": 1}
        assert found.kernels["conv2d"] == times + 1
        assert sum(found.torch.values()) == times + 1
        assert found.passes["group_norms"] == 2
        assert found.left.keys() == {"", "second"}
        assert "draws random numbers" in found.left[""]
        assert "reads the values of tensors" in found.left["second"]
    lines = str(found).splitlines()
    assert lines[:2] == ["captured: first, 3 calls", "captured: second.block"]
    assert f"not captured: the network as a whole, {found.left['']}" in lines
    assert f"not captured: second, {found.left['second']}" in lines
    assert "torch: what the modules that are not captured do beside calling others" in lines


def test_only_what_the_call_leaves_is_explained():
    class Sometimes(Draws):
        def forward(self, x, noise):
            return super().forward(x) if noise else self.first(x)

    fast = cmfast.accelerate(Sometimes())
    assert cmfast.explain(fast, X, True).left
    found = cmfast.explain(fast, X, False)
    assert (found.captured, found.left) == ({"": 1}, {})


def test_nothing_is_left_where_the_kernels_serve_all():
    found = cmfast.explain(cmfast.accelerate(nn.Sequential(nn.Conv2d(8, 8, 1))), X)
    assert found.torch == {}
    assert "torch: nothing" in str(found).splitlines()


def test_without_elements_nothing_is_captured():
    found = cmfast.explain(cmfast.accelerate(Block()), X[:0])
    assert found.captured == {}
    assert str(found).splitlines()[0] == "captured: nothing"


def test_a_consistency_model_and_a_pipeline():
    model = cmfast.accelerate(cmfast.load("digits"))
    found = cmfast.explain(model, torch.zeros(1, *model.sample_shape), 1.0, torch.tensor([3]))
    assert found.captured == {"unet": 1}
    pipe = cmfast.accelerate(pipeline(tiny=True))
    found = cmfast.explain(pipe, "a cat", num_inference_steps=2)
    assert found.captured == {"unet": 2, "vae.decoder": 1}
    assert str(found).startswith("captured: unet, 2 calls\ncaptured: vae.decoder\n")


def test_errors():
    for model, kind in ((Block(), "Block"), (cmfast.load("digits"), "ConsistencyModel"), ({}, "dict")):
        message = f"explain: expected a model that cmfast.accelerate returned, got a plain {kind}"
        with pytest.raises(ValueError, match=message):
            cmfast.explain(model, X)
    fast = cmfast.accelerate(Block())
    with pytest.raises(RuntimeError, match="channels"):
        cmfast.explain(fast, X[:, :3])
    assert cmfast.explain(fast, X).captured == {"": 1}
