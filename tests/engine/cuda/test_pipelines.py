"""diffusers pipelines on the target for GPUs."""

import copy

import numpy as np
import torch

import cmfast
from cmfast.engine.accelerator import accelerator_of
from cmfast.engine.cuda import GpuTarget

from ..networks import error
from ..tiny_pipelines import images, pipeline, unet
from .device import DEVICE


def test_images_are_the_same():
    pipe = pipeline(tiny=True).to(DEVICE)
    expected = images(pipe, 1)
    cmfast.accelerate(pipe)
    assert np.abs(images(pipe, 1) - expected).max() < 1 / 255
    for network in (pipe.unet, pipe.vae.decoder):
        accelerator = accelerator_of(network)
        assert isinstance(accelerator.target, GpuTarget)
        assert not accelerator.left


@torch.no_grad()
def test_text_meets_images_in_their_dtype():
    network = unet().to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    sizes = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 16), "timestep_cond": (2, 8)}
    given = {name: torch.randn(size, generator=generator).to(DEVICE) for name, size in sizes.items()}

    def call(net, dtype=torch.float32):
        found = net(timestep=torch.tensor(500, device=DEVICE), **{name: x.to(dtype) for name, x in given.items()})
        return found.sample

    expected = call(network).double()
    torchs = error(call(copy.deepcopy(network).bfloat16(), torch.bfloat16), expected)
    fast = cmfast.accelerate(network, torch.bfloat16)
    assert error(call(fast), expected) < 2 * torchs
    (made,) = accelerator_of(fast)._made.programs.values()
    assert [x.dtype for x in made.executable.steps.inputs].count(torch.bfloat16) == 2  # not what is embedded
    assert not [s for s in made.executable.steps.steps if s.reason == "its dtype is another"]
