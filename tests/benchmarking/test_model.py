"""What `cmfast bench model` measures: that outputs are judged, and computed by what the rows name."""

import time

import pytest
import torch
from cmfast.kernels import backends, reference

from cmfast import UNet
from cmfast.benchmarking import ceilings, devices, model
from cmfast.benchmarking.model import VARIANTS, Evaluations
from cmfast.benchmarking.networks import configuration, inputs, random_network

from ..fixture_files import tiny_unet


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 16)
    monkeypatch.setattr(devices.Cpu, "cache_bytes", 1 << 16)
    monkeypatch.setattr(devices, "TURN", 1e-6)


def unet():
    return random_network(tiny_unet().config, "cpu")


def measured(dtype=torch.float32, batches=(1,), network=None, **options):
    network = unet() if network is None else random_network(network.config, "cpu")
    bench = Evaluations("tiny", network, devices.Cpu(), dtype, batches, rounds=2, **options)
    assert len(list(bench.measure())) == bench.steps
    return bench


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_variant_and_batch(dtype):
    bench = measured(dtype, (1, 3))
    assert [(row.key["batch"], row.key["variant"]) for row in bench.rows] == [(n, v) for n in (1, 3) for v in VARIANTS]
    name = str(dtype).removeprefix("torch.")
    for row in bench.rows:
        assert not row.problem
        assert len(row.samples["evaluation"]) == 2
        assert 0 < row.facts["error"] < (1e-5 if dtype == torch.float32 else 5e-2)
        assert row.facts["layout"] in ({None} if row.key["variant"] == "accelerated" else LAYOUTS)
        assert row.key["dtype"] == name
        assert row.control == (row.key["variant"] == "torch")
    assert len(bench.ceilings) == 5
    assert all(len(row.samples["cold"]) == 2 for row in bench.ceilings.values())


LAYOUTS = {"channels first", "channels last"}


@pytest.mark.parametrize("slower", sorted(LAYOUTS))
def test_torch_has_its_faster_layout(monkeypatch, slower):
    """In the other one the network waits."""
    plain = UNet.forward

    def forward(network, x, *rest):
        if (slower == "channels last") == x.is_contiguous(memory_format=torch.channels_last):
            time.sleep(0.02)
        return plain(network, x, *rest)

    monkeypatch.setattr(UNet, "forward", forward)
    rows = measured(variants=["torch", "eager"], network=tiny_unet(in_channels=3, out_channels=3)).rows
    assert [row.facts["layout"] for row in rows] == [(LAYOUTS - {slower}).pop()] * 2


@pytest.mark.parametrize("dims", [1, 3])
def test_sound_and_video(dims):
    rows = measured(network=tiny_unet(dims=dims)).rows
    assert [row.problem for row in rows] == [""] * 3
    assert rows[0].facts["layout"] in (LAYOUTS if dims == 3 else {"channels first"})


def test_a_wrong_network_has_no_time(monkeypatch):
    accelerate = model.accelerate

    def spoilt(network, dtype):
        with torch.no_grad():
            network.out[2].weight[0] += 0.1
        return accelerate(network, dtype)

    monkeypatch.setattr(model, "accelerate", spoilt)
    rows = measured().rows
    assert [row.problem.partition(":")[0] for row in rows] == ["", "", "wrong"]
    assert rows[2].problem.startswith("wrong: off by ")
    assert not rows[2].samples


def test_rows_that_something_else_computes_are_void(monkeypatch):
    monkeypatch.setattr(model, "accelerate", lambda network, dtype: network)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "function", lambda name, op: getattr(reference, op))
        rows = measured().rows
    problems = {row.key["variant"]: row.problem for row in rows}
    assert problems["torch"] == ""
    assert problems["eager"].startswith("void: no kernel of cpu was launched: reference (")
    assert problems["accelerated"] == "void: torch computed the network, or a part of it: no program of the engine ran"


def test_plain_torch_calls_no_operator_of_cmfast(monkeypatch):
    import contextlib

    monkeypatch.setattr(model, "plain_operators", contextlib.nullcontext)
    (row,) = measured(variants=["torch"]).rows
    assert row.problem.startswith("void: cmfast's operators were called: cpu (")


def test_random_networks():
    assert configuration("lsun256").image_size == 256
    with pytest.raises(ValueError, match="--network must be one of imagenet64, lsun256, got sd"):
        configuration("sd")
    network = unet()
    x, timesteps, labels = inputs(network.config, "cpu", 3, torch.float32)
    y = network(x, timesteps, labels)
    assert 0.1 < y.std() < 10
    assert torch.equal(unet()(x, timesteps, labels), y)
    assert not network.training
