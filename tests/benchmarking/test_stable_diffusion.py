"""The network of `cmfast bench latency --network sd15`, at a small size."""

import sys

import pytest
import torch

import cmfast
from cmfast.benchmarking.stable_diffusion import decoder, latent_consistency_model

pytest.importorskip("diffusers")

SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "time_cond_proj_dim": 16,
}


def test_it_samples_and_is_accelerated():
    model = latent_consistency_model("cpu", torch.float32, **SMALL)
    samples = model.sample(2, steps=2)
    assert samples.shape == (2, 4, 8, 8)
    assert torch.isfinite(samples).all()
    assert samples.std() > 0.1
    fast = cmfast.accelerate(model)
    torch.testing.assert_close(fast.sample(2, steps=2), samples, rtol=1e-3, atol=1e-3)
    assert not cmfast.explain(fast, torch.zeros(2, 4, 8, 8), torch.zeros(2)).left


def test_the_decoder_makes_images_and_is_accelerated():
    made = decoder("cpu", torch.float32, block_out_channels=(32, 32), layers_per_block=1)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        images = made(latents)
        assert images.shape == (2, 3, 16, 16)
        assert images.std() > 0.1
        torch.testing.assert_close(cmfast.accelerate(made)(latents), images, rtol=1e-3, atol=1e-3)


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        latent_consistency_model("cpu", torch.float32)
