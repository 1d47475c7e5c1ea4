"""The plan of an evaluation on a GPU is what the target runs, and the released networks' keep their limits."""

import math

import pytest
import torch
from cmfast.kernels.triton import conv_config
from torch import nn

from cmfast import UNet, UNetConfig
from cmfast.engine import Accelerator
from cmfast.engine.cuda.plan import plan, plan_step

from .device import network

BF16 = torch.bfloat16


def released(name, batch=1):
    """The network and its inputs, without memory."""
    config = getattr(UNetConfig, name)()
    with torch.device("meta"):
        unet = UNet(config).eval()
        x, t, labels = (
            torch.empty(batch, *config.sample_shape),
            torch.empty(batch),
            torch.zeros(batch, dtype=torch.int64),
        )
    return unet, (x, t) if config.num_classes is None else (x, t, labels)


@pytest.fixture(scope="module", params=["imagenet64", "lsun256"])
def launches(request):
    unet, inputs = released(request.param)
    return request.param, unet, [*plan(unet, inputs), plan_step(inputs[0], dtype=BF16, gpu="H100")]


def test_operations_are_those_of_the_network(launches):
    name, _, found = launches
    expected = {"imagenet64": 219e9, "lsun256": 2239e9}[name]
    assert abs(sum(launch.flops for launch in found) / expected - 1) < 0.02


def test_there_are_few_launches(launches):
    name, _, found = launches
    assert len(found) <= {"imagenet64": 260, "lsun256": 280}[name]
    assert all(launch.operator.startswith("aten.") for launch in found if launch.reason)


def test_every_convolution_fills_a_large_gpu(launches):
    _, _, found = launches
    assert min(launch.programs for launch in found if launch.operator.startswith("conv2d")) >= 132


def test_little_is_moved_beside_weights_and_values(launches):
    """Weights once, and each layer's inputs and outputs once: what a launch keeps for itself is on top."""
    _, unet, found = launches
    assert sum(launch.bytes for launch in found) <= 1.25 * sum(launch.bytes - launch.scratch_bytes for launch in found)
    assert sum(launch.bytes for launch in found) > 2 * sum(p.numel() for p in unet.parameters())


def test_the_least_time_is_of_bytes_or_operations(launches):
    _, _, found = launches
    for launch in found:
        assert launch.floor_seconds >= launch.bytes / 3.35e12 > 0
        assert launch.floor_seconds >= launch.flops / 989.4e12


@pytest.mark.parametrize("kind", ["film", "audio"])
@torch.no_grad()
def test_what_is_planned_runs(kind):
    unet, inputs = network(kind)
    fast = Accelerator(unet, BF16)
    steps = fast.executable(inputs).steps.steps
    planned = plan(unet, inputs)
    assert [(launch.name, launch.layer, launch.operator, launch.reason) for launch in planned] == [
        (step.name, step.layer, step.operator, step.reason) for step in steps
    ]
    grids = [0 if step.reason else math.prod(step.call.args[0].grid) for step in steps]
    assert [launch.programs for launch in planned] == grids


def test_cards_and_dtypes_differ():
    unet, inputs = network("film")
    unet, inputs = unet.to("meta"), [x.to("meta") for x in inputs]

    def seconds(gpu, dtype):
        return sum(launch.floor_seconds for launch in plan(unet, inputs, gpu=gpu, dtype=dtype))

    assert seconds("H200", BF16) < seconds("H100", BF16) < seconds("A100", BF16) < seconds("RTX4090", BF16)
    assert seconds("MI300X", BF16) < seconds("MI300X", torch.float32)


def test_unknown_cards():
    with pytest.raises(ValueError, match=r"one of H100, .*MI300X, got 'H10'"):
        plan(nn.Identity(), (torch.ones(1, 3, 4, 4),), gpu="H10")


def test_bytes_are_those_of_the_tensors_and_of_parts_of_sums():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 32, 1)).eval()
    first, second = plan(net, (torch.empty(1, 64, 8, 8, device="meta"),))
    config = conv_config.configuration(64, 64, [64], 9, 2, "sm_90")
    tiles = 64 // config.block_n
    assert config.segments > 1
    parts = 4 * config.segments * tiles * config.block_m * config.block_n + 4 * tiles  # and tickets
    assert first.scratch_bytes == 2 * parts
    assert first.bytes == 2 * (64 * 64 + 64 * 64 * 9 + 64 * 64) + 4 * 64 + first.scratch_bytes
    assert second.scratch_bytes == 0
    assert second.bytes == 2 * (64 * 64 + 64 * 32 + 32 * 64) + 4 * 32
