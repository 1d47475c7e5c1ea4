"""Stable Diffusion 1.5's network, as latent consistency models have it, and decoder, with weights drawn at random."""

from typing import Any

import torch
from torch import Tensor, nn

from ..model import ConsistencyModel
from ..preconditioning import LatentConsistency
from .networks import drawn


class TextConditioned(nn.Module):
    """A UNet2DConditionModel as cmfast samples networks: forward(x, timesteps), for one text and one guidance."""

    text: Tensor
    guidance: Tensor

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("text", torch.randn(1, 77, unet.config.cross_attention_dim))
        self.register_buffer("guidance", torch.randn(1, unet.config.time_cond_proj_dim))

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: None = None) -> Tensor:
        """Latents [N, 4, H, W], timesteps [N]."""
        text, guidance = (t.expand(len(x), *t.shape[1:]).to(x.dtype) for t in (self.text, self.guidance))
        return self.unet(x, timesteps, text, timestep_cond=guidance, return_dict=False)[0]


def latent_consistency_model(device: str, dtype: torch.dtype, **sizes: Any) -> ConsistencyModel:
    """The model of 64 × 64 latents, 860 million parameters; `sizes` are others for diffusers' UNet2DConditionModel.

    Raises:
        ImportError: diffusers is not installed.
    """
    config = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "time_cond_proj_dim": 256}
    with torch.device("meta"):
        unet: Any = _diffusers().UNet2DConditionModel(**(config | sizes))
    torch.manual_seed(0)
    network = TextConditioned(drawn(unet, device)).to(device, dtype).eval()
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    return ConsistencyModel(network, LatentConsistency(), sample_shape=shape)


def decoder(device: str, dtype: torch.dtype, **sizes: Any) -> nn.Module:
    """The decoder of 64 × 64 latents to images of 512 × 512; `sizes` are others for diffusers' AutoencoderKL.

    Raises:
        ImportError: diffusers is not installed.
    """
    config: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    config |= sizes
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    with torch.device("meta"):
        found: Any = _diffusers().AutoencoderKL(**config, **blocks).decoder
    return drawn(found, device).to(dtype)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("--network sd15 is a network of diffusers: pip install diffusers") from error
    return diffusers
