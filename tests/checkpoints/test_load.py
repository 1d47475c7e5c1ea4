import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch

import cmfast
from cmfast import CheckpointError, ConsistencyModel, UNet, UNetConfig
from cmfast.checkpoints import formats, openai_config
from cmfast.preconditioning import EDM, Consistency, LatentConsistency

from ..fixture_files import FIXTURES, tiny_config, tiny_unet


@pytest.fixture
def model():
    return ConsistencyModel(tiny_unet(), Consistency(sigma_data=0.4), recommended_levels={2: (80.0, 0.8)})


@pytest.mark.parametrize(
    "scheme", [Consistency(sigma_data=0.4), EDM(), LatentConsistency(prediction_type="v_prediction")]
)
def test_save_and_load(tmp_path, model, scheme):
    model.preconditioning = scheme
    model.recommended_levels = {2: (80.0, 0.8)} if isinstance(scheme, EDM) else {2: (999.0, 499.0)}
    model.save(tmp_path / "folder")
    loaded = cmfast.load(tmp_path / "folder")
    assert loaded.unet.config == model.unet.config
    assert loaded.preconditioning == scheme
    assert loaded.recommended_levels == model.recommended_levels
    arguments = {"seed": 3, "sampler": "multistep", "steps": 2}
    assert torch.equal(loaded.sample(2, **arguments), model.sample(2, **arguments))
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_dtypes(tmp_path, model):
    cmfast.save(model, tmp_path / "half", dtype=torch.float16)
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in model.parameters())
    assert cmfast.load(tmp_path / "half").dtype == torch.float32
    assert cmfast.load(tmp_path / "half", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_preconditioning_can_be_replaced(tmp_path, model):
    model.save(tmp_path)
    assert cmfast.load(tmp_path, preconditioning=EDM()).preconditioning == EDM()


def test_recommended_levels_are_those_of_the_files_preconditioning(tmp_path, model):
    model.save(tmp_path)
    for given, kept in (
        (dataclasses.replace(model.preconditioning, clip_denoised=False, num_train_timesteps=18), True),
        (Consistency(sigma_data=0.4, sigma_max=20.0), False),
        (EDM(sigma_data=0.4), False),
        (LatentConsistency(), False),
    ):
        loaded = cmfast.load(tmp_path, preconditioning=given)
        assert loaded.recommended_levels == (model.recommended_levels if kept else {})
        assert loaded.sample(1, steps=2, sampler="multistep").isfinite().all()


@pytest.mark.parametrize(
    "levels", [{"2": "81"}, {"2": ["a", "b"]}, {"2": [80.0]}, {"2": [80.0, -1.0]}, {"x": [1.0]}, [1]]
)
def test_recommended_levels_that_are_none(tmp_path, model, levels):
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"recommended_levels": levels}))
    with pytest.raises(CheckpointError, match="is not a configuration written by cmfast"):
        cmfast.load(tmp_path)


def test_files_of_two_models_are_told_apart(tmp_path, model):
    """As a process that saves over another model leaves them when it is killed in between."""
    model.save(tmp_path / "first")
    model.preconditioning = EDM()
    model.save(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        mixed = tmp_path / f"other {name}"
        shutil.copytree(tmp_path / "first", mixed)
        shutil.copy(tmp_path / "second" / name, mixed)
        with pytest.raises(CheckpointError, match=r"model.safetensors is of another model than config.json"):
            cmfast.load(mixed)
    edited = json.loads((tmp_path / "first" / "config.json").read_text()) | {"recommended_levels": {}}
    (tmp_path / "first" / "config.json").write_text(json.dumps(edited))
    assert cmfast.load(tmp_path / "first").recommended_levels == {}


@pytest.mark.parametrize("kind", ["diffusers", "network", "text"])
def test_nothing_is_saved_over_another_librarys_model(tmp_path, kind):
    model = cmfast.load("digits")
    formats.write(model.checkpoint(), tmp_path / "there", "diffusers")
    folder = tmp_path / "there" / "unet" if kind == "network" else tmp_path / "there"
    if kind == "text":
        folder = tmp_path
        (folder / "config.json").write_text("none")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    name = "model_index.json" if kind == "diffusers" else "config.json"
    with pytest.raises(FileExistsError, match=f"has a {name} that is not cmfast's"):
        model.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_a_sample_shape_of_ones_own_is_kept(tmp_path):
    model = ConsistencyModel(tiny_unet(), sample_shape=(1, 16, 12))
    model.save(tmp_path)
    loaded = cmfast.load(tmp_path)
    assert loaded.sample_shape == (1, 16, 12)
    torch.testing.assert_close(loaded.sample(1, seed=3), model.sample(1, seed=3))
    for wrong, message in (
        (
            {"sample_shape": (3, 8, 8)},
            r"sample_shape \[3, 8, 8\] does not fit its network, whose samples are \[1, 8, 8\]",
        ),
        ({"num_classes": 4}, "only the network's own number of classes, 10, is stored, and this model has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ConsistencyModel(tiny_unet(), **wrong).save(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


class Mine(EDM):
    """A scheme that cmfast does not know."""


def test_a_scheme_of_ones_own_is_given_where_it_is_loaded(tmp_path, model):
    model.save(tmp_path)
    model.preconditioning = Mine()
    with pytest.raises(ValueError, match="the preconditioning Mine is not one of EDM, Consistency, TrigFlow, "):
        model.save(tmp_path / "mine")
    config = json.loads((tmp_path / "config.json").read_text())
    for other in ("Mine", "karras_sigmas", "Coefficients", "Preconditioning"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"preconditioning": {"type": other}}))
        with pytest.raises(CheckpointError, match="is not a configuration written by cmfast"):
            cmfast.load(tmp_path)
        assert type(cmfast.load(tmp_path, preconditioning=Mine()).preconditioning) is Mine


def test_weights_that_are_tied_are_stored_each(tmp_path, model):
    first, second = model.unet.middle_block[0], model.unet.middle_block[2]
    first.in_layers[2].weight = second.in_layers[2].weight
    model.save(tmp_path)
    torch.testing.assert_close(cmfast.load(tmp_path).sample(1, seed=3), model.sample(1, seed=3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_are_not_stored_as_other_numbers(tmp_path, model, dtype):
    with pytest.raises(ValueError, match=f"weights are float64, float32, float16 or bfloat16, got {dtype}"):
        model.save(tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["imagenet64", "lsun256"])
def test_released_configurations_are_read_off_the_weights(name):
    released = json.loads((FIXTURES / f"released_{name}_state_dict.json").read_text())
    weights = {key: torch.empty(shape, device="meta") for key, shape in released["state_dict"].items()}
    assert openai_config(weights) == getattr(UNetConfig, name)()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": None, "in_channels": 3, "out_channels": 6},
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"use_scale_shift_norm": False, "channel_mult": (1, 1, 2, 4), "image_size": 16},
        {"channel_mult": (1,), "attention_resolutions": (1,), "resblock_updown": False},
        {"channel_mult": (2, 3), "attention_resolutions": (1, 2), "num_res_blocks": 3},
        {"attention_resolutions": ()},
        {"dims": 1, "image_size": 16},
        {"dims": 3, "resblock_updown": False},
    ],
)
def test_every_determined_field_is_read(changes):
    config = tiny_config(**changes)
    with torch.device("meta"):
        weights = UNet(config).state_dict()
    given = {"image_size": config.image_size, "num_head_channels": 32}
    assert openai_config(weights, given) == config
    assert openai_config(weights, given | {"channel_mult": list(config.channel_mult)}) == config


def test_openai_files(tmp_path):
    unet = tiny_unet()
    torch.save(unet.state_dict(), tmp_path / "cd_tiny.pt")
    options = {"image_size": 8, "num_head_channels": 32}
    model = cmfast.load(tmp_path / "cd_tiny.pt", **options)
    assert model.preconditioning == Consistency()
    expected = ConsistencyModel(unet).sample(2)
    torch.testing.assert_close(model.sample(2), expected)
    torch.save(unet.state_dict(), tmp_path / "edm_tiny.pt")
    assert cmfast.load(tmp_path / "edm_tiny.pt", **options).preconditioning == EDM()


def test_released_values_are_the_defaults(tmp_path):
    config = tiny_config(model_channels=64, num_head_channels=64, image_size=64, channel_mult=(1, 2, 3, 4))
    torch.save(UNet(config).state_dict(), tmp_path / "ct.pt")
    assert cmfast.load(tmp_path / "ct.pt").unet.config == config


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_runs_code_does_not_run(tmp_path, write):
    marker = tmp_path / "ran"
    write({"time_embed.0.weight": Malicious(marker)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="something else than tensors"):
        cmfast.load(tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(tmp_path, dtype):
    weights = {name: value.to(dtype) for name, value in tiny_unet().state_dict().items()}
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"model.pt: \S+ is {dtype}, expected floating-point numbers"):
        cmfast.load(tmp_path / "model.pt", image_size=8, num_head_channels=16)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path, model):
    model.save(tmp_path)
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        cmfast.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 1000, 5000, -100])
def test_truncated_files(tmp_path, keep):
    torch.save(tiny_unet().state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        cmfast.load(tmp_path / "cut.pt")


def without(weights, key):
    return {k: v for k, v in weights.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"conv.weight": torch.ones(3)}, "not the state_dict of an OpenAI U-Net"),
        (lambda w: without(w, "out.2.bias"), "1 names are missing"),
        (lambda w: w | {"extra.weight": torch.ones(1)}, "1 names are not this network's"),
        (lambda w: w | {"out.2.bias": torch.ones(5)}, "1 names have other shapes"),
        (lambda w: {"model": w}, "a dict with the keys model"),
        (lambda w: {}, "an empty dict"),
        (lambda w: [1, 2], "a list"),
    ],
)
def test_files_of_other_things(tmp_path, change, message):
    torch.save(change(tiny_unet().state_dict()), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        cmfast.load(tmp_path / "other.pt", image_size=8, num_head_channels=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_head_channels": 32}, "give image_size"),
        ({"image_size": 8}, "heads must divide"),
        ({"image_size": 8, "num_head_channels": 32, "model_channels": 64}, "the weights have model_channels 32"),
        ({"image_size": 8, "channels": 3}, "unknown configuration fields channels"),
    ],
)
def test_fields_that_do_not_fit(tmp_path, options, message):
    torch.save(tiny_unet(channel_mult=(1, 1), num_res_blocks=2).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        cmfast.load(tmp_path / "m.pt", **options)


def test_missing_things(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="digits"):
        cmfast.load(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        cmfast.load(tmp_path)
    model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        cmfast.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"unet": {"sizes": 3}}'])
def test_bad_configurations(tmp_path, model, text):
    model.save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a configuration"):
        cmfast.load(tmp_path)


def test_bad_weights_in_a_folder(tmp_path, model):
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        cmfast.load(tmp_path)
    other = ConsistencyModel(tiny_unet(num_classes=7))
    other.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["unet"] = dataclasses.asdict(model.unet.config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another network"):
        cmfast.load(tmp_path)


def test_a_folder_takes_no_configuration(tmp_path, model):
    model.save(tmp_path)
    with pytest.raises(ValueError, match="cannot be given"):
        cmfast.load(tmp_path, image_size=16)


def test_saving_where_it_cannot_be(tmp_path, model):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        model.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"

    class Other(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"only models of a cmfast\.UNet"):
        cmfast.save(ConsistencyModel(Other(), sample_shape=(1, 8, 8)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    model.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("cmfast.checkpoints.folder.write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_a_gpu_that_is_not_there_is_said(device):
    with pytest.raises(ValueError, match=r"the device cuda.* was asked for, and torch .* sees no GPU"):
        cmfast.load("digits", device=device)


def test_a_damaged_file_is_a_checkpoint_error(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(tiny_unet().state_dict(), whole)
    names = zipfile.ZipFile(whole).namelist()
    pickled = next(name for name in names if name.endswith("data.pkl"))
    content = zipfile.ZipFile(whole).read(pickled)
    random = np.random.RandomState(0)
    for _ in range(200):
        bytes_ = bytearray(content)
        for position in random.randint(len(content), size=3):
            bytes_[position] = random.randint(256)
        damaged = tmp_path / "damaged.pt"
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(damaged, "w") as new:
            for name in names:
                new.writestr(name, bytes(bytes_) if name == pickled else old.read(name))
        with contextlib.suppress(cmfast.CheckpointError):
            cmfast.load(damaged)
