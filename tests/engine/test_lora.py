"""LoRAs by diffusers and PEFT on accelerated pipelines: the next call computes with what the networks have then."""

import numpy as np
import pytest
import torch

import cmfast
from cmfast.engine.accelerator import accelerator_of

from . import tiny_pipelines
from .tiny_pipelines import images

peft = pytest.importorskip("peft")

UNIT = 1 / 255
LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
CONV = ["conv1", "conv2", "proj_in", "time_emb_proj"]


#: A UNet of one level: every change of a LoRA captures it anew.
LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def pipeline():
    return tiny_pipelines.pipeline(tiny=True, **LEVEL)


def config(targets=LINEAR, **changes):
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **changes)


def strengthen(module, seed=0):
    """LoRAs whose share of an image is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.6 / p[0].numel() ** 0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of LoRAs as diffusers saves them: of the attention's projections, and of convolutions too."""
    found = []
    for seed, targets in enumerate((LINEAR, LINEAR + CONV)):
        pipe = pipeline()
        pipe.unet.add_adapter(config(targets))
        strengthen(pipe.unet, seed)
        folder = tmp_path_factory.mktemp(f"lora_{seed}")
        layers = peft.get_peft_model_state_dict(pipe.unet)
        assert len(layers) >= 16
        type(pipe).save_lora_weights(folder, unet_lora_layers=layers)
        found.append(folder)
    return found


#: What is done in order, and whether the images are then others than before it.
STEPS = {
    "loaded": lambda p, files: p.load_lora_weights(files[0], adapter_name="first"),
    "scaled": lambda p, files: p.set_adapters("first", 0.5),
    "a second": lambda p, files: p.load_lora_weights(files[1], adapter_name="second"),  # not active yet
    "both": lambda p, files: p.set_adapters(["first", "second"], [0.7, 0.3]),
    "the second": lambda p, files: p.set_adapters("second", 1.0),
    "disabled": lambda p, files: p.disable_lora(),
    "enabled": lambda p, files: p.enable_lora(),
    "fused": lambda p, files: p.fuse_lora(lora_scale=0.8),
    "unfused": lambda p, files: p.unfuse_lora(),  # its scale stays
    "deleted": lambda p, files: p.delete_adapters("second"),
    "unloaded": lambda p, files: p.unload_lora_weights(),
    "loaded again": lambda p, files: p.load_lora_weights(files[1]),
}


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_diffusers_does_with_loras(files, when):
    plain, pipe = pipeline(), pipeline()
    base = images(plain)
    if when == "after":
        cmfast.accelerate(pipe)
        assert np.abs(images(pipe) - base).max() <= UNIT
    before = base
    steps = STEPS if when == "after" else dict(list(STEPS.items())[:4])
    for name, step in steps.items():
        step(plain, files)
        step(pipe, files)
        if when == "before" and name == "loaded":
            cmfast.accelerate(pipe)
        expected = images(plain)
        for _ in range(2):
            assert np.abs(images(pipe) - expected).max() <= UNIT, name
        if name not in ("a second", "unfused"):
            assert np.abs(before - expected).max() > 2 * UNIT, f"{name}: nothing to see"
        before = expected
        if name == "unloaded":
            assert np.abs(base - expected).max() <= UNIT


def test_loaded_scaled_and_unloaded_after(files):
    """The acceptance: images of LCM's, within one value of 8 bits."""
    plain, pipe = pipeline(), cmfast.accelerate(pipeline())
    for change in (
        lambda p: None,
        lambda p: p.load_lora_weights(files[1], adapter_name="a"),
        lambda p: p.set_adapters("a", 0.5),
        lambda p: p.unload_lora_weights(),
    ):
        change(plain)
        change(pipe)
        for steps in (1, 2, 4, 8):
            for guidance in (0.0, 8.5):
                found, expected = (images(p, steps, guidance_scale=guidance) for p in (pipe, plain))
                assert np.abs(found - expected).max() <= UNIT


def test_the_scale_of_a_call(files):
    plain, pipe = pipeline(), pipeline()
    for p in (plain, pipe):
        p.load_lora_weights(files[0])
    cmfast.accelerate(pipe)
    shown = []
    for scale in (1.0, 0.3, 0.0, 0.3, 0.7):
        arguments = {"cross_attention_kwargs": {"scale": scale}}
        shown.append(images(plain, **arguments))
        assert np.abs(images(pipe, **arguments) - shown[-1]).max() <= UNIT
    assert np.abs(images(pipe) - images(plain)).max() <= UNIT
    assert np.abs(shown[0] - shown[2]).max() > 5 * UNIT
    made = accelerator_of(pipe.unet)._made
    images(pipe, cross_attention_kwargs={"scale": 0.3})
    assert accelerator_of(pipe.unet)._made is made


def test_weights_of_a_lora_are_written_to(files):
    plain, pipe = pipeline(), pipeline()
    cmfast.accelerate(pipe)
    for p in (plain, pipe):
        p.unet.add_adapter(config(CONV + LINEAR), adapter_name="trained")
    for seed in range(2):
        for p in (plain, pipe):
            strengthen(p.unet, seed)
        assert np.abs(images(pipe) - images(plain)).max() <= UNIT
    for p in (plain, pipe):
        p.unet.set_adapters(["trained"], [0.25])
    assert np.abs(images(pipe) - images(plain)).max() <= UNIT


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)).mean((2, 3)))


#: All that PEFT has for a layer: DoRA, rank-stabilised, with a bias of its own.
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "bias": {"lora_bias": True}}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_peft_models(kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(Small(), config(["first", "second"], **KINDS[kind])).eval()
    strengthen(model, 1)
    fast = cmfast.accelerate(model)
    x = torch.randn(2, 3, 6, 6)
    seen = [fast(x)]
    first = model.base_model.model.first
    for change in (
        lambda: None,
        lambda: first.set_scale("default", 0.25),
        lambda: first.scale_layer(3.0),
        lambda: first.unscale_layer(),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.add_adapter("other", config(["first", "second"])),
        lambda: model.set_adapter("other"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: first.lora_A["default"].weight.data.mul_(2),
        lambda: model.delete_adapter("other"),
    ):
        change()
        expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        seen.append(expected)
    assert len({tuple(y.flatten().tolist()) for y in seen}) >= 9
