"""Networks of other projects: right, of the same type and keys, and nothing that costs time is left to torch."""

import warnings

import pytest
import torch

import cmfast
from cmfast.engine.accelerator import accelerator_of

from .guided_diffusion import UNetModel

diffusers = pytest.importorskip("diffusers")

#: Operators that the kernels have: of these networks torch must be left none.
OURS = (
    "aten.convolution",
    "aten.addmm",
    "aten.mm",
    "aten.bmm",
    "aten._softmax",
    "aten.native_group_norm",
    "aten.native_layer_norm",
    "cmfast.conv2d",
    "cmfast.attention",
    "cmfast.group_norm",
    "cmfast.channel_norm",
)


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
    return diffusers.UNet2DModel(**(config | changes)), lambda n, g: ((noise(g, n, 3, 16, 24), times(n)), {})


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

    def inputs(n, g):
        named = {name: noise(g, n, *size) for name, size in (more or {}).items() if name != "added"}
        if "added" in (more or {}):
            named["added_cond_kwargs"] = {name: noise(g, n, *size) for name, size in more["added"].items()}
        return (noise(g, n, 4, 8, 12), 37, noise(g, n, 13, 48)), named

    return diffusers.UNet2DConditionModel(**(config | changes)), inputs


def autoencoder():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)


def guided(**changes):
    return UNetModel(**changes), lambda n, g: ((noise(g, n, 3, 16, 16), times(n)), {})


def times(n):
    return torch.linspace(3, 900, n)


def noise(generator, *size):
    return torch.randn(size, generator=generator)


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
    "AutoencoderKL's decoder": lambda: (autoencoder().decoder, lambda n, g: ((noise(g, n, 4, 7, 6),), {})),
    "AutoencoderKL's encoder": lambda: (autoencoder().encoder, lambda n, g: ((noise(g, n, 3, 22, 16),), {})),
    "AutoencoderTiny's decoder": lambda: (
        diffusers.AutoencoderTiny().decoder,
        lambda n, g: ((noise(g, n, 4, 5, 6),), {}),
    ),
    "guided-diffusion": guided,
    "guided-diffusion, legacy order": lambda: guided(new_order=False),
    "guided-diffusion, added embedding": lambda: guided(film=False, updown=False),
}


def build(name):
    """The network with weights that let each layer matter, and its inputs of a batch."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        network, inputs = FAMILIES[name]()
        torch.manual_seed(0)
        for p in network.parameters():
            torch.nn.init.normal_(p, 0.5, 0.2) if p.ndim == 1 else torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return network.eval(), inputs


def image(output):
    return output if isinstance(output, torch.Tensor) else output.sample


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_it_is_right_and_served_by_kernels(name, batch):
    network, inputs = build(name)
    args, kwargs = inputs(batch, torch.Generator().manual_seed(1))
    expected = network(*args, **kwargs)
    fast = cmfast.accelerate(network)
    found = fast(*args, **kwargs)
    assert type(fast) is type(network)
    assert type(found) is type(expected)
    assert fast.state_dict().keys() == network.state_dict().keys()
    assert (image(found) - image(expected)).abs().max() < 1e-5 * image(expected).abs().max()
    steps = accelerator_of(fast).executable(args, kwargs).steps.steps
    assert [step.operator for step in steps if step.reason and step.operator in OURS] == []


@pytest.mark.parametrize("name", ["UNet2DModel", "LCM", "AutoencoderTiny's decoder", "Stable Diffusion"])
@torch.no_grad()
def test_bfloat16_is_as_accurate_as_torchs(name):
    network, inputs = build(name)
    args, kwargs = inputs(2, torch.Generator().manual_seed(1))
    expected = image(network(*args, **kwargs))
    found = image(cmfast.accelerate(network, torch.bfloat16)(*args, **kwargs))
    half = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in args]
    named = {k: x.bfloat16() for k, x in kwargs.items()}
    plain = image(network.bfloat16()(*half, **named)).float()
    assert (found - expected).norm() < 2 * (plain - expected).norm()
