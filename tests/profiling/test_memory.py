import pytest
import torch
from torch import nn

import cmfast

from ..engine.networks import network


@pytest.fixture(scope="module")
def found():
    unet, inputs = network("film")
    return cmfast.profile(cmfast.accelerate(unet), *inputs)


def test_the_peak_is_the_size_of_the_arena(found):
    (run,) = found.trace.runs
    memory = found.memory()
    assert memory.arena_bytes == run.executable.bytes == max(step.end_bytes for step in memory.steps)
    assert memory.peak.live_bytes == max(step.live_bytes for step in memory.steps) <= memory.arena_bytes
    assert memory.packed_bytes == run.target.bytes
    assert [step.name for step in memory.steps] == [step.name for step in run.executable.steps.steps]


def test_weights_are_counted_where_they_are_read_first():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x):
            return self.conv(self.conv(x).tanh())

    memory = cmfast.profile(cmfast.accelerate(Twice().eval()), torch.ones(1, 16, 4, 4)).memory()
    weights = 4 * (16 * 16 + 16) + 64  # packed weights begin with a cache line that says how they lie
    assert [step.weight_bytes for step in memory.steps] == [weights, 0, 0]
    value = 4 * 16 * 16
    assert [step.live_bytes for step in memory.steps] == [2 * value] * 3
    assert [step.written_bytes for step in memory.steps] == [value] * 3
    (layer, whole) = sorted(memory.by_layer(), key=lambda step: step.layer, reverse=True)
    assert (layer.layer, layer.written_bytes, layer.weight_bytes) == ("conv", 2 * value, weights)
    assert (whole.layer, whole.live_bytes, whole.weight_bytes) == ("", 2 * value, 0)


def test_a_program_without_steps_takes_no_memory():
    memory = cmfast.profile(cmfast.accelerate(nn.Identity()), torch.ones(1, 3)).memory()
    assert memory.steps == []
    assert memory.peak == ("", "", "", 0, 0, 0, 0)
    assert memory.by_layer() == []
    assert str(memory).startswith("memory: 0.00 MB for values, of which at most 0.00 live; 0.00 MB of packed weights\n")


def test_the_table_is_by_layer(found):
    memory = found.memory()
    layers = memory.by_layer(1)
    assert {"input_blocks", "output_blocks", "middle_block", "out"} <= {layer.layer for layer in layers}
    for field in ("written_bytes", "weight_bytes"):
        assert sum(getattr(layer, field) for layer in layers) == sum(getattr(step, field) for step in memory.steps)
    assert layers[0].live_bytes == memory.peak.live_bytes
    text = str(memory)
    assert text.startswith(f"memory: {memory.arena_bytes / 1e6:.2f} MB for values")
    assert f"{layers[0].live_bytes / 1e6:.3f}" in text
    assert memory.summary()["steps"][0]["layer"] == memory.steps[0].layer
