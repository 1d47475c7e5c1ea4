"""Folders of diffusers, held to diffusers itself: its networks, its pipeline, its scheduler."""

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

import cmfast
from cmfast import CheckpointError, ConsistencyModel, UNet, UNetConfig
from cmfast.checkpoints import left_out, read, write
from cmfast.checkpoints.checkpoint import Checkpoint, channel_multiples
from cmfast.checkpoints.diffusers_config import unet2d_config, unet_config
from cmfast.checkpoints.diffusers_names import to_diffusers
from cmfast.checkpoints.formats import format_of
from cmfast.preconditioning import EDM, Consistency, Flow
from cmfast.sampling import sample_multistep

from ..fixture_files import FIXTURES, tiny_config, tiny_unet

diffusers = pytest.importorskip("diffusers")

#: That of diffusers' own test of the conversion, and the released ones' (scripts/convert_consistency_to_diffusers.py).
IMAGENET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "num_class_embeds": 10,
    "block_out_channels": [32, 64],
    "attention_head_dim": 16,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "upsample_type": "resnet",
    "downsample_type": "resnet",
}
LSUN = IMAGENET | {
    "layers_per_block": 2,
    "num_class_embeds": None,
    "block_out_channels": [32, 32, 96],
    "down_block_types": ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "default",
    "attn_norm_num_groups": None,
}
CONVOLUTIONS = IMAGENET | {
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UNetResUpBlock2D", "AttnUpBlock2D"],
    "block_out_channels": [64, 96, 64],
    "attention_head_dim": None,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "in_channels": 1,
    "out_channels": 2,
    "act_fn": "swish",
}
NETWORKS = {
    "imagenet": IMAGENET,
    "lsun": LSUN,
    "convolutions": CONVOLUTIONS,
    "attention before resnet resampling": IMAGENET
    | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2},
    "plain last level": IMAGENET
    | {"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
    | {"up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"]},
    "one level": IMAGENET
    | {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [32]},
}
RELEASED = {
    "imagenet64": IMAGENET
    | {
        "sample_size": 64,
        "layers_per_block": 3,
        "num_class_embeds": 1000,
        "block_out_channels": [192, 384, 576, 768],
        "attention_head_dim": 64,
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    },
    "lsun256": LSUN
    | {
        "sample_size": 256,
        "block_out_channels": [256, 256, 512, 512, 1024, 1024],
        "attention_head_dim": 64,
        "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3,
    },
}


def network(settings, seed=0):
    """diffusers' own, with random weights everywhere: its norms begin as ones and zeros."""
    torch.manual_seed(seed)
    result = diffusers.UNet2DModel(**settings).eval()
    with torch.no_grad():
        for p in result.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    return result


def pipeline(settings=IMAGENET, seed=0, **schedule):
    return diffusers.ConsistencyModelPipeline(
        network(settings, seed), diffusers.CMStochasticIterativeScheduler(**schedule)
    )


def tensors_of(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_a_network_evaluates_as_in_diffusers(tmp_path, settings):
    theirs = network(settings)
    theirs.save_pretrained(tmp_path)
    model = cmfast.load(tmp_path)
    assert model.preconditioning == Consistency()
    torch.manual_seed(1)
    x, t = torch.randn(3, theirs.config.in_channels, 8, 8), torch.tensor([1095.5, -300.25, 0.5])
    labels = torch.tensor([0, 9, 4]) if model.num_classes else None
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(model.unet(x, t, labels), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_its_configuration_survives(settings):
    config = unet_config(settings, "here")
    assert unet_config(unet2d_config(config), "there") == config
    assert {k: v.shape for k, v in diffusers.UNet2DModel(**unet2d_config(config)).state_dict().items()} == {
        k: v.shape for k, v in to_diffusers(config, UNet(config).state_dict()).items()
    }


@pytest.mark.parametrize("name", ["imagenet64", "lsun256"])
def test_the_released_networks(name):
    """Their structure on the meta device: OpenAI's released names against diffusers' names and shapes."""
    released = json.loads((FIXTURES / f"released_{name}_state_dict.json").read_text())["state_dict"]
    weights = {key: torch.empty(shape, device="meta") for key, shape in released.items()}
    config = unet_config(RELEASED[name], "here")
    assert config == getattr(UNetConfig, name)()
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**RELEASED[name]).state_dict()
    converted = to_diffusers(config, weights)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in theirs.items()}
    written = unet2d_config(config)
    with torch.device("meta"):
        assert diffusers.UNet2DModel(**written).state_dict().keys() == theirs.keys()


def test_a_pipeline_samples_as_in_diffusers(tmp_path):
    """One step and two steps on the same noise; timesteps [22, 0] there are (0, 22) here."""
    pipe = pipeline(sigma_data=0.4, sigma_max=60.0, rho=6.0)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    model = cmfast.load(tmp_path)
    assert model.preconditioning == Consistency(0.4, 0.002, 60.0, 6.0)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 3, 8, 8, generator=generator)
    later = torch.Generator().manual_seed(5)
    second = torch.randn(4, 3, 8, 8, generator=later)
    labels = torch.tensor([3, 1, 4, 1])
    for theirs, ours in (([0], (0,)), ([22, 0], (0, 22))):
        arguments = {"batch_size": 4, "class_labels": labels, "latents": first, "output_type": "pt"}
        arguments |= {"num_inference_steps": None, "timesteps": theirs, "generator": torch.Generator().manual_seed(5)}
        expected = pipe(**arguments).images
        sigmas = [model.preconditioning.grid(40)[t] for t in ours]
        x = sigmas[0] * first
        samples = sample_multistep(model.denoiser(labels), x, sigmas, noise=lambda like, draw: second)
        torch.testing.assert_close((samples / 2 + 0.5).clamp(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_the_scheduler_says_whether_to_clip_and_the_grid(tmp_path):
    pipeline(sigma_data=4.0, clip_denoised=False, num_train_timesteps=201).save_pretrained(tmp_path)
    model = cmfast.load(tmp_path)
    assert model.preconditioning == Consistency(4.0, clip_denoised=False, num_train_timesteps=201)
    assert model.sample(2).abs().max() > 1
    assert torch.equal(model.sample(2), model.sample(2, clip=None))
    assert model.sample(2, clip=1.0).abs().max() <= 1
    assert torch.equal(model.sample(1, timesteps=(0, 106)), model.sample(1, timesteps=(0, 106), grid_steps=201))
    with pytest.raises(ValueError, match=r"indices in 0 … 200"):
        model.sample(1, timesteps=(0, 201))
    with pytest.raises(ValueError, match='a number, None or "model"'):
        model.denoiser(clip="never")


@pytest.mark.parametrize("model", ["digits", "digits-teacher"])
def test_what_diffusers_samples_of_our_model(tmp_path, model):
    model = cmfast.load(model, preconditioning=Consistency())
    write(model.checkpoint(), tmp_path / "folder", "diffusers")
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    generator, labels = torch.Generator().manual_seed(0), [3, 1, 4, 1]
    got = pipe(batch_size=4, class_labels=labels, generator=generator, output_type="pt").images
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model.denoise(80.0 * noise, 80.0, torch.tensor(labels), clip=1.0)
    torch.testing.assert_close(got, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)
    assert diffusers.UNet2DModel.from_pretrained(tmp_path / "folder", subfolder="unet").config.sample_size == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [IMAGENET, LSUN, CONVOLUTIONS], ids=["imagenet", "lsun", "convolutions"])
def test_tensors_keep_their_bits(tmp_path, settings, dtype):
    """There and back through each of the other formats."""
    pipeline(settings, clip_denoised=False).to(dtype).save_pretrained(tmp_path / "theirs")
    first = read(tmp_path / "theirs")
    write(first, tmp_path / "ours", "cmfast")
    second = read(tmp_path / "ours")
    assert second.config == first.config
    assert second.preconditioning == first.preconditioning == Consistency(clip_denoised=False)
    same_bits(second.weights, first.weights)
    write(second, tmp_path / "again", "diffusers")
    same_bits(tensors_of(tmp_path / "again" / "unet"), tensors_of(tmp_path / "theirs" / "unet"))
    write(first, tmp_path / "openai.pt", "openai")
    given = left_out(first)
    third = read(tmp_path / "openai.pt", given.pop("preconditioning"), config=given)
    assert third.config == first.config
    assert third.preconditioning == first.preconditioning
    same_bits(third.weights, first.weights)
    write(third, tmp_path / "last", "diffusers")
    same_bits(tensors_of(tmp_path / "last" / "unet"), tensors_of(tmp_path / "theirs" / "unet"))


@pytest.mark.parametrize(("channels", "given"), [(64, {}), (32, {"num_head_channels": 32})])
def test_what_is_as_in_the_released_models_is_no_argument(channels, given):
    sizes = {"image_size": 64, "channel_mult": (1, 2, 3, 4), "model_channels": 64}
    with torch.device("meta"):
        network = UNet(tiny_config(num_head_channels=channels, **sizes))
    weights = network.state_dict()
    assert left_out(Checkpoint(network.config, weights, Consistency(), {}, "a test")) == given


def test_patches_are_an_argument_of_openais_files_and_nothing_of_diffusers(tmp_path):
    network = UNet(tiny_config(patch_size=2, image_size=16))
    checkpoint = Checkpoint(network.config, network.state_dict(), Consistency(), {}, "a test")
    write(checkpoint, tmp_path / "a.pt", "openai")
    given = left_out(checkpoint)
    assert given["patch_size"] == 2
    assert read(tmp_path / "a.pt", config=given).config == network.config
    with pytest.raises(ValueError, match="patch_size is 2: it has no patches"):
        write(checkpoint, tmp_path / "folder", "diffusers")


def test_recommended_levels_survive(tmp_path):
    write(cmfast.load("digits").checkpoint(), tmp_path / "folder", "diffusers")
    assert cmfast.load(tmp_path / "folder").recommended_levels == cmfast.load("digits").recommended_levels
    (tmp_path / "folder" / "cmfast.json").write_text('{"recommended_levels": 3}')
    with pytest.raises(CheckpointError, match="not a configuration written by cmfast"):
        cmfast.load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 1}, "dims is 1"),
        ({"dims": 3, "resblock_updown": False}, "dims is 3"),
        ({"image_size": (8, 16)}, "images are square"),
        ({"channel_mult": (2, 3)}, "channel_mult begins with 2"),
        ({"resblock_updown": False, "conv_resample": False}, "conv_resample is False"),
        ({"num_head_channels": None, "num_heads": 2, "attention_resolutions": (1,)}, "num_heads is 2"),
    ],
)
def test_networks_that_diffusers_has_not(tmp_path, changes, message):
    model = ConsistencyModel(tiny_unet(**changes))
    with pytest.raises(ValueError, match=message):
        write(model.checkpoint(), tmp_path / "folder", "diffusers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", [EDM(), Flow()])
def test_preconditionings_that_diffusers_has_not(tmp_path, scheme):
    with pytest.raises(ValueError, match="cannot say the preconditioning"):
        write(ConsistencyModel(tiny_unet(), scheme).checkpoint(), tmp_path / "folder", "diffusers")
    assert not list(tmp_path.iterdir())


def test_heads_of_one_size():
    config = tiny_config(channel_mult=(1, 1), num_head_channels=None, num_heads=2)
    assert unet2d_config(config)["attention_head_dim"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, not 1e-05"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, not 32"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "resample by conv and resnet"),
        ({"down_block_types": ["AttnDownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D, not AttnDownBlock2D"),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 2}, "does not mirror"),
        ({"down_block_types": ["ResnetDownsampleBlock2D"]}, "1 down_block_types"),
        ({"attn_norm_num_groups": None}, "no group norm, not 32 groups"),
        ({"add_attention": False}, "add_attention is False"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"time_embedding_dim": 64}, "time_embedding_dim is 64, not 128"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"freq_shift": 1, "flip_sin_to_cos": False}, "freq_shift is 1, not 0; flip_sin_to_cos is False"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'"),
        ({"attention_head_dim": 24}, r"attention_head_dim 24 does not divide \[64\]"),
        ({"block_out_channels": [48, 64]}, "multiple of 32"),
        ({"block_out_channels": None}, "not a configuration of a UNet2DModel"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block is \[1, 2\], not a whole number"),
        ({"in_channels": "3"}, "in_channels is '3', not a whole number"),
        ({"num_class_embeds": 1.5}, r"num_class_embeds is 1\.5, not a whole number"),
        ({"sample_size": "large"}, "sample_size is 'large'"),
        ({"transformer_layers": 3}, "transformer_layers is 3, which cmfast does not know"),
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel of diffusers.*cmfast.accelerate takes any"),
    ],
)
def test_networks_that_cmfast_has_not(tmp_path, changes, message):
    network(IMAGENET).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        cmfast.load(tmp_path)


def test_every_misfit_is_named_and_the_way_out():
    """A network of DDPM's kind."""
    with pytest.raises(CheckpointError, match=r"norm_eps.*downsample_padding is 0, not 1.*cmfast\.accelerate"):
        unet_config({"block_out_channels": [32] * 4, "norm_eps": 1e-6, "downsample_padding": 0, "sample_size": 8}, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s_noise": 1.01}, "s_noise is 1.01"),
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler"),
        ({"order": 2}, "order is 2"),
        ({"sigma_max": "80"}, "sigma_max is '80', not a number"),
    ],
)
def test_schedulers_that_cmfast_has_not(tmp_path, changes, message):
    pipeline().save_pretrained(tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(CheckpointError, match=f"{message}.*give a preconditioning"):
        cmfast.load(tmp_path)
    assert cmfast.load(tmp_path, preconditioning=EDM()).preconditioning == EDM()


def test_other_pipelines_are_said(tmp_path):
    diffusers.DDPMPipeline(network(IMAGENET), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a DDPMPipeline of diffusers; cmfast\.load reads"):
        cmfast.load(tmp_path)


def test_image_size_where_the_configuration_has_none(tmp_path):
    network(IMAGENET | {"sample_size": None}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no sample_size: give image_size"):
        cmfast.load(tmp_path)
    assert cmfast.load(tmp_path, image_size=16).sample_shape == (3, 16, 16)
    edit(tmp_path / "config.json", sample_size=[8, 16])
    assert cmfast.load(tmp_path).sample_shape == (3, 8, 16)
    with pytest.raises(ValueError, match="image_size cannot be given"):
        cmfast.load(tmp_path, image_size=16)
    with pytest.raises(ValueError, match="num_heads cannot be given"):
        cmfast.load(tmp_path, num_heads=2)


def test_variants(tmp_path):
    pipe = pipeline()
    expected = read_of(pipe.unet.half())
    pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"there are weights for variant='fp16'"):
        cmfast.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"of the variant 'ema'.*there are weights for variant='fp16'"):
        cmfast.load(tmp_path, variant="ema")
    assert cmfast.load(tmp_path, variant="fp16").dtype == torch.float32
    same_bits(to_diffusers(*parts(read(tmp_path, variant="fp16"))), expected)
    pipeline(seed=1).save_pretrained(tmp_path)  # both are there
    assert not torch.equal(cmfast.load(tmp_path).sample(1), cmfast.load(tmp_path, variant="fp16").sample(1))


def read_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def parts(checkpoint):
    return checkpoint.config, checkpoint.weights


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards_and_pickles(tmp_path, variant, safe):
    theirs = network(IMAGENET)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB", safe_serialization=safe, variant=variant)
    assert len(list(tmp_path.glob("*-of-*"))) > 2
    same_bits(to_diffusers(*parts(read(tmp_path, variant=variant))), read_of(theirs))
    index = next(tmp_path.glob("*.index.*"))
    for changes, error, message in (
        ({"weight_map": {}}, CheckpointError, "no weight_map"),
        ({"weight_map": {"a": "../other.safetensors"}}, CheckpointError, "not beside it"),
        ({"weight_map": {"a": "none.safetensors"}}, FileNotFoundError, "which is missing"),
    ):
        content = index.read_text()
        edit(index, **changes)
        with pytest.raises(error, match=message):
            read(tmp_path, variant=variant)
        index.write_text(content)
    edit(index, weight_map=dict(list(json.loads(index.read_text())["weight_map"].items())[1:]))
    with pytest.raises(CheckpointError, match="disagree about 1 tensors"):
        read(tmp_path, variant=variant)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_pickle_is_read_safely(tmp_path, variant):
    theirs = network(IMAGENET)
    theirs.save_pretrained(tmp_path, safe_serialization=False, variant=variant)
    (file,) = tmp_path.glob("*.bin")
    same_bits(to_diffusers(*parts(read(tmp_path, variant=variant))), read_of(theirs))
    torch.save({"conv_in.weight": Fraction(1, 2)}, file)
    with pytest.raises(CheckpointError, match="something else than tensors"):
        read(tmp_path, variant=variant)


def test_damaged_folders(tmp_path):
    pipeline().save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for change, message in (
        ({k: v for k, v in weights.items() if k != "conv_in.bias"}, r"1 names are missing \(conv_in.bias\)"),
        (weights | {"extra": torch.ones(1)}, r"1 names are not this network's \(extra\)"),
        (weights | {"conv_in.bias": torch.ones(3)}, "1 names have other shapes"),
        (weights | {"mid_block.attentions.0.to_q.weight": torch.ones(64, 64).half()}, "different dtypes"),
    ):
        save_file(change, file)
        with pytest.raises(CheckpointError, match=message):
            cmfast.load(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        cmfast.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        cmfast.load(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is missing"):
        cmfast.load(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        cmfast.load(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("cmfast.checkpoints.diffusers.write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        write(ConsistencyModel(tiny_unet()).checkpoint(), tmp_path / "folder", "diffusers")
    assert not list(tmp_path.iterdir())


def test_channels_that_division_would_lose():
    """1952 / 224 · 224 is less than 1952 in floating point."""
    assert int(1952 / 224 * 224) == 1951
    multiples = channel_multiples([224, 1952, 672], 224)
    assert [int(m * 224) for m in multiples] == [224, 1952, 672]
    assert multiples[0] == 1
    assert isinstance(multiples[2], int)


def test_a_dtype_that_is_too_small():
    unet = tiny_unet()
    weights = unet.state_dict() | {"out.2.bias": torch.tensor([1e6])}
    checkpoint = Checkpoint(unet.config, weights, Consistency(), {}, "here")
    with pytest.raises(ValueError, match=r"out\.2\.bias has values beyond 65504"):
        checkpoint.to(torch.float16)
    assert checkpoint.to(torch.bfloat16).weights["out.2.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("file", ["config.json", "model_index.json"])
def test_other_classes_are_refused_by_their_configuration_alone(file, tmp_path):
    (tmp_path / file).write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(CheckpointError, match="holds a UNet2DConditionModel of diffusers"):
        format_of(tmp_path)
