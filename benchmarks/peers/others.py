"""Networks of other projects, at the sizes that people run: tensors in, one tensor out."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn


class Flat(nn.Module):
    """A network as exporters want it: its inputs by place, and its one output as a tensor."""

    def __init__(self, network, names, **constants):
        super().__init__()
        self.network, self.names, self.constants = network, names, constants

    def forward(self, *inputs):
        """Inputs in the order of `names`; the first output alone."""
        output = self.network(**dict(zip(self.names, inputs, strict=True)), **self.constants)
        return output if isinstance(output, torch.Tensor) else output[0]


@dataclasses.dataclass(frozen=True)
class Other:
    """A network of another project.

    Attributes:
        build: makes it; called with tensors on the meta device.
        inputs: their sizes without the batch, by the names of the forward's parameters; "timestep" and
            "class_labels" are one of 1000, "time" is a whole number that bfloat16 has too.
        constants: further arguments of the forward.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Sequence[int]]
    constants: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def network(self):
        """The network without weights."""
        with torch.device("meta"):
            return Flat(self.build(), list(self.inputs), **self.constants).eval().requires_grad_(False)

    def arrays(self, batch, random):
        """The inputs, drawn at random, by name."""
        found = {}
        for name, size in self.inputs.items():
            noise = random.standard_normal((batch, *size)).astype("float32")
            if name in ("timestep", "class_labels"):
                found[name] = random.randint(1000, size=batch)
            else:
                found[name] = random.randint(256, size=batch).astype("float32") if name == "time" else noise
        return found


def import_diffusers():
    """The package: `python -m` puts the checkout's root on the path, where it takes kernels/ for another package."""
    root = Path(__file__).resolve().parents[2]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != root]
    import diffusers

    return diffusers


def _stable_diffusion():
    """The UNet of Stable Diffusion 1.5 as latent consistency models have it: 860 million parameters."""
    return import_diffusers().UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256
    )


def _imagenet64():
    """A UNet2DModel of the shape of cmfast's imagenet64."""
    return import_diffusers().UNet2DModel(
        sample_size=64,
        layers_per_block=3,
        block_out_channels=(192, 384, 576, 768),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=64,
        num_class_embeds=1000,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        time_embedding_type="positional",
    )


def _decoder(name):
    def build():
        diffusers = import_diffusers()
        if name == "AutoencoderTiny":
            return diffusers.AutoencoderTiny().decoder
        channels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return diffusers.AutoencoderKL(latent_channels=4, **channels, **blocks).decoder

    return build


def _denoising_diffusion():
    """The Unet that its README starts with: 36 million parameters, linear attention at three of four sizes."""
    import denoising_diffusion_pytorch

    return denoising_diffusion_pytorch.Unet(dim=64, dim_mults=(1, 2, 4, 8))


OTHERS = {
    "sd15-lcm": Other(
        _stable_diffusion,
        {"sample": (4, 64, 64), "timestep": (), "encoder_hidden_states": (77, 768), "timestep_cond": (256,)},
        {"return_dict": False},
    ),
    "unet2d-imagenet64": Other(
        _imagenet64, {"sample": (3, 64, 64), "timestep": (), "class_labels": ()}, {"return_dict": False}
    ),
    "autoencoder-kl": Other(_decoder("AutoencoderKL"), {"sample": (4, 64, 64)}),
    "autoencoder-tiny": Other(_decoder("AutoencoderTiny"), {"x": (4, 64, 64)}),
    "denoising-diffusion": Other(_denoising_diffusion, {"x": (3, 64, 64), "time": ()}),
}
