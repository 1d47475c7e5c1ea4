"""One evaluation of the released networks and of the bundled one, on every backend that serves this device."""

import pytest
import torch

import cmfast
from cmfast import kernels
from cmfast.benchmarking import networks

from .test_operators import DEVICE, SERVING

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def timed_evaluation(benchmark, unet, batch, backend, rounds):
    given = networks.inputs(unet.config, DEVICE.name, batch, next(unet.parameters()).dtype)

    def run():
        with torch.inference_mode(), kernels.use_backend(backend):
            y = unet(*given)
        DEVICE.synchronize()
        return y

    assert torch.isfinite(run()).all()
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("name", ["imagenet64"] + (["lsun256"] if DEVICE.name == "cuda" else []))
def test_released_network(benchmark, name, memory_format, dtype, backend):
    unet = networks.random_network(networks.configuration(name), DEVICE.name, dtype).to(memory_format=memory_format)
    timed_evaluation(benchmark, unet, 1, backend, rounds=5)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("batch", [1, 64])
def test_bundled_network(benchmark, batch, backend):
    timed_evaluation(benchmark, cmfast.load("digits", device=DEVICE.name).unet, batch, backend, rounds=20)
