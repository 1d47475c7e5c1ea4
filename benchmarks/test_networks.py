"""One evaluation of the released networks and of the bundled one, on every backend that serves this device."""

import pytest
import torch

import cmfast
from cmfast import UNet, UNetConfig, kernels

from .test_operators import DEVICE, SERVING

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def released(name, dtype):
    """A network of the released sizes; the time does not depend on the weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet(getattr(UNetConfig, name)())
    unet = unet.to_empty(device=DEVICE)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return unet.to(dtype).eval()


def timed_evaluation(benchmark, unet, batch, backend, rounds):
    config = unet.config
    dtype = next(unet.parameters()).dtype
    x = torch.randn(batch, *config.sample_shape, device=DEVICE, dtype=dtype)
    t = torch.full((batch,), 500.0, device=DEVICE)
    labels = None if config.num_classes is None else torch.zeros(batch, dtype=torch.int64, device=DEVICE)

    def run():
        with torch.inference_mode(), kernels.use_backend(backend):
            y = unet(x, t, labels)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return y

    assert torch.isfinite(run()).all()
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
@pytest.mark.parametrize("name", ["imagenet64"] + (["lsun256"] if DEVICE == "cuda" else []))
def test_released_network(benchmark, name, memory_format, dtype, backend):
    unet = released(name, dtype).to(memory_format=memory_format)
    timed_evaluation(benchmark, unet, 1, backend, rounds=5)


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("batch", [1, 64])
def test_bundled_network(benchmark, batch, backend):
    timed_evaluation(benchmark, cmfast.load("digits", device=DEVICE).unet, batch, backend, rounds=20)
