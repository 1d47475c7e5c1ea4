"""Networks of other projects, each with what draws its inputs: of a batch, of a size that all take, or an odd one."""

import functools
import warnings

import pytest
import torch

from .denoising_diffusion import Unet
from .guided_diffusion import UNetModel
from .k_diffusion import ImageDenoiserModelV1
from .latent_diffusion import Decoder, Encoder, Model

diffusers = pytest.importorskip("diffusers")


def times(n):
    """Numbers of eight bits, so that those of bfloat16 are the same."""
    return torch.tensor([3.0, 448.0, 896.0])[:n]


def noise(generator, *size):
    return torch.randn(size, generator=generator)


def images(channels=3, *, usual=(16, 24), odd=(10, 14)):
    """Inputs that are an image."""
    return lambda n, g, is_odd: ((noise(g, n, channels, *(odd if is_odd else usual)),), {})


def timed(more=None, **sizes):
    """Inputs that are an image, the times of its samples, and tensors of other sizes by name."""
    image = images(**sizes)

    def inputs(n, g, is_odd):
        (x,), _ = image(n, g, is_odd)
        return (x, times(n)), {name: noise(g, n, *(size or x.shape[1:])) for name, size in (more or {}).items()}

    return inputs


def unet(**changes):
    config = {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    }
    return diffusers.UNet2DModel(**(config | changes)), timed()


def conditional(more=None, **changes):
    config = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 48,
    }

    def inputs(n, g, is_odd):
        named = {name: noise(g, n, *size) for name, size in (more or {}).items() if name != "added"}
        if "added" in (more or {}):
            named["added_cond_kwargs"] = {name: noise(g, n, *size) for name, size in more["added"].items()}
        return (noise(g, n, 4, *((7, 11) if is_odd else (8, 12))), 37, noise(g, n, 13, 48)), named

    return diffusers.UNet2DConditionModel(**(config | changes)), inputs


def autoencoder():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)


def denoiser(more=None, *, padding=False, odd=(10, 14), **changes):
    """k-diffusion's network; the last two of seven tokens are padding of every other sample."""
    image = timed(more, odd=odd)

    def inputs(n, g, is_odd):
        (x, _), named = image(n, g, is_odd)
        if padding:
            named["cross_cond_padding"] = torch.tensor([[0.0] * 7, [0.0] * 5 + [1.0] * 2, [0.0] * 7])[:n]
        return (x, torch.tensor([0.25, 2.0, 64.0])[:n]), named

    return ImageDenoiserModelV1(**changes), inputs


XL = {"text_embeds": (20,), "time_ids": (6,)}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
SKIPS = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "norm_num_groups": None,
}
THREE_STAGES = {"channels": (16, 16, 32), "depths": (1, 1, 1), "self_attn_depths": (False, False, True)}
CONDITIONED = {"mapping_cond_dim": 9, "unet_cond_dim": 3}
latents = functools.partial(images, 4, usual=(7, 6), odd=(5, 3))
FAMILIES = {
    "UNet2DModel": unet,
    "UNet2DModel, resnets that resample": lambda: unet(**RESNETS),
    "UNet2DModel, skip blocks": lambda: unet(**SKIPS),
    "UNet2DModel, padded on two sides": lambda: unet(downsample_padding=0),
    "Stable Diffusion": conditional,
    "Stable Diffusion XL": lambda: conditional(
        {"added": XL},
        use_linear_projection=True,
        transformer_layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    ),
    "LCM": lambda: conditional({"timestep_cond": (32,)}, time_cond_proj_dim=32),
    "AutoencoderKL's decoder": lambda: (autoencoder().decoder, latents()),
    "AutoencoderKL's encoder": lambda: (autoencoder().encoder, images(usual=(22, 16), odd=(21, 15))),
    "AutoencoderTiny's decoder": lambda: (diffusers.AutoencoderTiny().decoder, latents(usual=(5, 6))),
    "guided-diffusion": lambda: (UNetModel(), timed()),
    "guided-diffusion, legacy order": lambda: (UNetModel(new_order=False), timed()),
    "guided-diffusion, added embedding": lambda: (UNetModel(film=False, updown=False), timed()),
    "denoising-diffusion": lambda: (Unet(16), timed()),
    "denoising-diffusion, full attention": lambda: (Unet(16, full_attn=(True, True)), timed()),
    "denoising-diffusion, flash attention": lambda: (Unet(16, full_attn=(True, True), flash_attn=True), timed()),
    "denoising-diffusion, self-conditioned": lambda: (
        Unet(16, self_condition=True, learned_variance=True, learned_sinusoidal_cond=True),
        timed({"x_self_cond": None}),
    ),
    "denoising-diffusion, no self-condition yet": lambda: (Unet(16, self_condition=True), timed()),
    "k-diffusion": denoiser,
    "k-diffusion, cross attention": lambda: denoiser({"cross_cond": (7, 20)}, padding=True, cross_cond_dim=20),
    "k-diffusion, one stage skipped": lambda: denoiser(**THREE_STAGES, skip_stages=1),
    "k-diffusion, patches": lambda: denoiser(
        {"mapping_cond": (9,), "unet_cond": None}, patch_size=2, has_variance=True, odd=(20, 28), **CONDITIONED
    ),
    "latent diffusion": lambda: (Model(), timed()),
    "latent diffusion, other layers": lambda: (Model(conv_shortcut=True, resamp_with_conv=False), timed()),
    "latent diffusion's encoder": lambda: (Encoder(), images(usual=(22, 16), odd=(21, 15))),
    "latent diffusion's decoder": lambda: (Decoder(), latents()),
}


def build(name):
    """The network with weights that let each layer matter, and its inputs of a batch."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        network, inputs = FAMILIES[name]()
        for p in network.parameters():
            torch.nn.init.normal_(p, 0.5, 0.2) if p.ndim == 1 else torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return network.eval(), lambda n, is_odd: inputs(n, torch.Generator().manual_seed(1), is_odd)
