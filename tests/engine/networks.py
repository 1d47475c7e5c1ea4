"""Small networks of every kind, and inputs for them."""

import torch

from ..fixture_files import tiny_unet

#: name: changes of the tiny class-conditional network
KINDS = {
    "film": {},
    "added": {"use_scale_shift_norm": False, "num_classes": None},
    "strided": {"resblock_updown": False},
    "pooled": {"resblock_updown": False, "conv_resample": False},
    "three-levels": {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (1, 4), "image_size": 16},
    "audio": {"dims": 1, "image_size": 16},
    "audio-strided": {"dims": 1, "image_size": 26, "resblock_updown": False},
    "video": {"dims": 3, "image_size": (3, 8, 8)},
    "video-strided": {"dims": 3, "image_size": (5, 6, 10), "resblock_updown": False},
    "video-patches": {"dims": 3, "image_size": (3, 8, 12), "patch_size": 2, "resblock_updown": False},
    "patches": {"image_size": (8, 12), "patch_size": 2, "in_channels": 2, "out_channels": 2},
}
IMAGES = [name for name, changes in KINDS.items() if changes.get("dims", 2) == 2]


def network(kind, batch=2, seed=0, **changes):
    """(network, its inputs)."""
    unet = tiny_unet(seed, **(KINDS[kind] | changes))
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, *unet.config.sample_shape, generator=generator), torch.linspace(-300, 900, batch)]
    if unet.config.num_classes is not None:
        inputs.append(torch.arange(batch) % unet.config.num_classes)
    return unet, inputs


def error(actual, exact):
    """The relative error of a whole network's output."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def exact(unet, inputs):
    """The output in float64; the network stays as it is."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in unet.state_dict().items()}
    x, *rest = (t.double() if t.is_floating_point() else t for t in inputs)
    return torch.func.functional_call(unet, wide, (x, *rest))


class Net(torch.nn.Module):
    """A function of itself and its inputs, with layers and attributes."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)
