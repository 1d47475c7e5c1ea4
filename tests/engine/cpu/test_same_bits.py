"""A sample of an accelerated network: the same bits in every batch, at every place in it, by any number of threads."""

import pytest
import torch

from cmfast import ConsistencyModel, accelerate

from ...fixture_files import tiny_unet
from ..networks import network

SAMPLES = 17
#: The sizes of batches, by the number of threads: those that are more than cores wait for each other.
SIZES = {1: range(1, SAMPLES + 1), 2: (1, 5, SAMPLES), 3: (1, 5)}
#: Changes of the tiny network: images of many parts, and layers whose threads share the output channels.
LARGER = {
    "large-image": {"image_size": (36, 44), "resblock_updown": False},
    "wide": {"image_size": 16, "model_channels": 96},
}
SAMPLERS = {
    "onestep": {},
    "multistep": {"timesteps": (0, 22)},
    "heun": {"steps": 5},
    "ancestral": {"steps": 5},
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["film", "three-levels", "audio-strided", "video", *LARGER])
@torch.inference_mode()
def test_in_every_batch(kind, dtype):
    unet, inputs = network("film", SAMPLES, **LARGER[kind]) if kind in LARGER else network(kind, SAMPLES)
    fast = accelerate(unet, dtype=dtype)
    torch.set_num_threads(1)
    alone = torch.cat([fast(*(t[i : i + 1] for t in inputs)) for i in range(SAMPLES)])
    for threads, sizes in SIZES.items():
        torch.set_num_threads(threads)
        for size in sizes:
            first = SAMPLES - size // 2 - 1  # so that samples are at other places than before
            chosen = torch.arange(first, first + size) % SAMPLES
            assert torch.equal(fast(*(t[chosen] for t in inputs)), alone[chosen]), (threads, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_whatever_the_sampler(sampler, dtype):
    model = accelerate(ConsistencyModel(tiny_unet(0)), dtype=dtype)
    options = {"seed": 3, "class_labels": 1, "sampler": sampler, **SAMPLERS[sampler]}
    torch.set_num_threads(1)
    alone = torch.cat([model.sample(1, first_sample=i, **options) for i in range(SAMPLES)])
    for threads, sizes in {1: (1, 2, 3, 8, SAMPLES), 2: (5,), 3: (SAMPLES,)}.items():
        torch.set_num_threads(threads)
        for size in sizes:
            assert torch.equal(model.sample(SAMPLES, batch_size=size, **options), alone), (threads, size)
