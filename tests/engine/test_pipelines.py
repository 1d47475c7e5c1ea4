"""diffusers pipelines: the same images, whatever the pipeline, its scheduler and the arguments of the call."""

import copy

import numpy as np
import pytest
import torch

import cmfast
from cmfast.engine.accelerator import accelerator_of

from . import tiny_pipelines
from .tiny_pipelines import diffusers, images, pipeline

#: One value of an image with 8 bits.
UNIT = 1 / 255


def close(found, expected, atol=UNIT):
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    assert np.abs(found - expected).max() <= atol


def programs(module):
    return len(accelerator_of(module)._made.programs)


@pytest.mark.parametrize("tiny", [False, True], ids=["AutoencoderKL", "AutoencoderTiny"])
def test_latent_consistency(tiny):
    plain, pipe = pipeline(tiny=tiny), pipeline(tiny=tiny)
    unet, modules = pipe.unet, dict(pipe.components)
    assert cmfast.accelerate(pipe) is pipe
    assert pipe.unet is unet
    assert all(pipe.components[name] is part for name, part in modules.items())
    for steps in (1, 2, 4, 8):
        for guidance in (0.0, 8.5):  # of the LCM, an embedding
            close(images(pipe, steps, guidance_scale=guidance), images(plain, steps, guidance_scale=guidance))
    assert programs(pipe.unet) == 1
    assert programs(pipe.vae.decoder) == 1
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    assert pipe.unet.config.sample_size == 8
    assert pipe.unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("LatentConsistencyModelImg2ImgPipeline", "LCMScheduler"),
        ("StableDiffusionPipeline", "TCDScheduler"),
        ("StableDiffusionImg2ImgPipeline", "EulerDiscreteScheduler"),
        ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
        ("StableDiffusionXLImg2ImgPipeline", "LCMScheduler"),
    ],
)
def test_kinds(kind, scheduler):
    plain, pipe = pipeline(kind, scheduler), cmfast.accelerate(pipeline(kind, scheduler))
    for steps, guidance in ((2, 1.0), (4, 5.0)):  # without and with a second evaluation in the batch
        close(images(pipe, steps, guidance_scale=guidance), images(plain, steps, guidance_scale=guidance))
    if "Img2Img" in kind:
        assert programs(pipe.vae.encoder) == 1


def test_consistency_models():
    def make():
        unet = diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        scheduler = diffusers.CMStochasticIterativeScheduler()
        pipe = diffusers.ConsistencyModelPipeline(tiny_pipelines._random(unet, 5), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    plain, pipe = make(), cmfast.accelerate(make())
    for steps in (1, 2, 4):
        close(images(pipe, steps, class_labels=1), images(plain, steps, class_labels=1))


def test_arguments_of_calls():
    plain, pipe = pipeline(), cmfast.accelerate(pipeline())
    embeds = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0))
    for arguments in (
        {"prompt": ["a cat", "a dog"]},
        {"num_images_per_prompt": 3},
        {"prompt_embeds": embeds},
        {"prompt_embeds": embeds[:, :5]},
        {"height": 24, "width": 32},
    ):
        close(images(pipe, **arguments), images(plain, **arguments))
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline is pipe, step, int(timestep)))
        return {"denoised": tensors["denoised"] * 0.5, "latents": tensors["latents"] * 0.5}

    names = ["latents", "denoised"]
    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    close(images(pipe, 3, **given), images(plain, 3, **given))
    assert [s[1:] for s in seen[:3]] == [s[1:] for s in seen[3:]]
    assert [s[0] for s in seen] == [True] * 3 + [False] * 3
    for kind in ("pil", "pt", "latent"):
        found, expected = (
            p("a cat", generator=torch.Generator().manual_seed(1), num_inference_steps=1, output_type=kind).images[0]
            for p in (pipe, plain)
        )
        assert type(found) is type(expected)
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=1, rtol=0)
    with pytest.raises(ValueError, match="have to be divisible by 8"):
        images(pipe, height=13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_pipelines(dtype):
    exact, plain, pipe = pipeline(), pipeline().to(dtype), pipeline().to(dtype)
    assert cmfast.accelerate(pipe).unet.dtype == dtype
    found, expected = images(pipe, 1), images(exact, 1)
    assert found.shape == expected.shape
    rounding = np.abs(images(plain, 1) - expected).max()
    assert np.abs(found - expected).max() <= 2 * rounding + UNIT
    pipe.to(torch.float32)
    close(images(pipe, 1), images(pipeline().to(dtype).to(torch.float32), 1), atol=0.05)


def test_products_in_bfloat16():
    plain, pipe = pipeline(), cmfast.accelerate(pipeline(), torch.bfloat16)
    assert accelerator_of(pipe.unet).products == torch.bfloat16
    found = images(pipe, 1)
    close(found, images(plain, 1), atol=0.1)
    assert np.abs(found - images(plain, 1)).max() > 1e-5


def test_restore_copies_and_saving(tmp_path):
    plain, pipe = pipeline(), cmfast.accelerate(pipeline())
    expected = images(plain)
    close(images(pipe), expected)
    copied = copy.deepcopy(pipe)
    assert accelerator_of(copied.unet) is None
    assert np.array_equal(images(copied), expected)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.state_dict().keys() == plain.unet.state_dict().keys()
    assert np.array_equal(images(loaded), expected)
    assert pipe.to("cpu") is pipe
    pipe.register_modules(scheduler=diffusers.LCMScheduler(beta_end=0.05))
    assert np.abs(images(pipe) - expected).max() > UNIT
    other = diffusers.LatentConsistencyModelImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert accelerator_of(other.unet) is accelerator_of(pipe.unet)
    pipe.register_modules(scheduler=plain.scheduler)
    close(images(pipe), expected)
    assert cmfast.restore(pipe) is pipe
    assert accelerator_of(pipe.unet) is None
    assert accelerator_of(pipe.vae.decoder) is None
    assert np.array_equal(images(pipe), expected)
    with pytest.raises(ValueError, match="got a plain LatentConsistencyModelPipeline"):
        cmfast.restore(pipe)


def test_hooks_of_its_networks(tmp_path):
    plain, pipe = pipeline(), pipeline()
    handle = pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * 0.5,))
    cmfast.accelerate(pipe, cache=tmp_path)
    halved = images(pipe)
    handle.remove()
    close(images(pipe), images(plain))
    assert np.abs(halved - images(plain)).max() > 0.01
    assert {p.name for p in tmp_path.iterdir()} == {"unet", "vae.decoder"}
    close(images(cmfast.accelerate(pipe, cache=tmp_path)), images(plain))


def test_other_things_are_said():
    with pytest.raises(TypeError, match=r"or a diffusers pipeline with a unet, a transformer or a vae, got dict"):
        cmfast.accelerate({})
    with pytest.raises(ValueError, match="got a plain dict"):
        cmfast.restore({})
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        cmfast.accelerate(pipeline(), torch.float16)
