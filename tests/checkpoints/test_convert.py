"""`cmfast convert`: every direction, to the bit, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cmfast import ConsistencyModel, load
from cmfast.checkpoints import read
from cmfast.preconditioning import EDM, Consistency

from ..fixture_files import tiny_unet

SIZES = ("--image-size", 8, "--num-head-channels", 32)


@pytest.fixture
def ours(tmp_path):
    model = ConsistencyModel(tiny_unet().half())
    model.save(tmp_path / "ours")
    return tmp_path / "ours"


def same(a, b):
    a, b = read(a, config=sizes(a)), read(b, config=sizes(b))
    assert a.config == b.config
    assert a.preconditioning == b.preconditioning
    assert a.weights.keys() == b.weights.keys()
    for name, value in a.weights.items():
        assert value.dtype == b.weights[name].dtype
        assert torch.equal(value.view(torch.uint8), b.weights[name].view(torch.uint8))


def sizes(path):
    return {"image_size": 8, "num_head_channels": 32} if path.is_file() else None


@pytest.mark.parametrize("first", ["openai", "diffusers", "cmfast"])
@pytest.mark.parametrize("second", ["openai", "diffusers", "cmfast"])
def test_there_and_back(cmfast, tmp_path, ours, first, second):
    one, two, back = (tmp_path / name for name in ("one", "two", "back"))
    for source, target, kind in ((ours, one, first), (one, two, second), (two, back, "cmfast")):
        status, out, _ = cmfast("convert", source, target, "--to", kind, *(SIZES if source.is_file() else ()))
        assert status == 0
        assert str(target) in out
        assert "float16" in out
        same(target, ours)
    loaded = load(two, **(sizes(two) or {}))
    for arguments in ({"steps": 1}, {"timesteps": (0, 22)}):
        torch.testing.assert_close(loaded.sample(2, **arguments), load(ours).sample(2, **arguments), rtol=0, atol=1e-5)


def test_the_format_follows_the_name(cmfast, tmp_path):
    status, out, _ = cmfast("convert", "digits", tmp_path / "digits.pt")
    assert status == 0
    assert "image_size=8, num_head_channels=32" in out
    assert "sigmas=(80.0, 0.5)" in out
    assert "out.2.bias" in torch.load(tmp_path / "digits.pt", weights_only=True)
    assert cmfast("convert", "digits", tmp_path / "digits")[0] == 0
    assert json.loads((tmp_path / "digits" / "config.json").read_text())["format"] == "cmfast"
    assert load(tmp_path / "digits").recommended_levels == load("digits").recommended_levels


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(cmfast, tmp_path, ours, dtype):
    assert cmfast("convert", ours, tmp_path / "out", "--to", "diffusers", "--dtype", dtype)[0] == 0
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}


def test_an_edm_file_is_told_by_its_name(cmfast, tmp_path):
    status, _, err = cmfast("convert", "digits-teacher", tmp_path / "teacher.pt")
    assert (status, "a name that begins with edm" in err) == (2, True)
    status, _, err = cmfast("convert", "digits", tmp_path / "edm_digits.pt")
    assert (status, "is an EDM model's; this one is none" in err) == (2, True)
    assert not list(tmp_path.iterdir())
    assert cmfast("convert", "digits-teacher", tmp_path / "edm.pt")[0] == 0
    assert load(tmp_path / "edm.pt", image_size=8, num_head_channels=32).preconditioning == EDM()


@pytest.mark.parametrize(
    ("scheme", "arguments", "message"),
    [
        (Consistency(sigma_data=0.4), ("--to", "openai"), "cannot say the preconditioning Consistency("),
        (EDM(), ("--to", "diffusers"), "cannot say the preconditioning EDM"),
        (Consistency(), ("--to", "onnx"), "--to must be one of openai, diffusers, cmfast"),
        (Consistency(), ("--dtype", "int8"), "--dtype must be one of"),
        (Consistency(), ("--variant", "fp16"), "has no variants"),
        (Consistency(), ("--image-size", "16"), "image_size cannot be given"),
    ],
)
def test_what_is_refused(cmfast, tmp_path, scheme, arguments, message):
    ConsistencyModel(tiny_unet(), scheme).save(tmp_path / "ours")
    status, _, err = cmfast("convert", tmp_path / "ours", tmp_path / "new" / "model", *arguments)
    assert status == 2
    assert message in err
    assert not (tmp_path / "new").exists()


def test_flags_are_named(cmfast, tmp_path):
    scheme = Consistency(num_train_timesteps=201)
    ConsistencyModel(tiny_unet(), scheme).save(tmp_path / "ours")
    out = cmfast("convert", tmp_path / "ours", tmp_path / "ct.pt")[1]
    assert f"image_size=8, num_head_channels=32, preconditioning={scheme}" in out
    same_model = load(tmp_path / "ct.pt", image_size=8, num_head_channels=32, preconditioning=scheme)
    expected = load(tmp_path / "ours").sample(1, timesteps=(0, 106))
    torch.testing.assert_close(same_model.sample(1, timesteps=(0, 106)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["diffusers", "cmfast"])
def test_a_folder_that_is_there_stays(cmfast, tmp_path, ours, kind):
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    status, _, err = cmfast("convert", "digits", ours, "--to", kind)
    assert (status, "is there already" in err) == (2, True)
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert cmfast("convert", "digits", tmp_path / "empty", "--to", kind)[0] == 0


def test_a_source_that_is_not_there(cmfast, tmp_path):
    status, _, err = cmfast("convert", tmp_path / "none.pt", tmp_path / "out")
    assert (status, "no model at" in err) == (2, True)
    assert not list(tmp_path.iterdir())
