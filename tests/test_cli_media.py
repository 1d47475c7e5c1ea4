"""`cmfast sample` of sound and video."""

import re
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast import ConsistencyModel, UNet, UNetConfig, load
from cmfast.sound import Mdct


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small models with random weights: `sound`, `waves` without a representation, and `video`."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "num_classes": 3}
    mdct = Mdct(sample_rate=8000, bands=8)
    sound = UNetConfig(image_size=10, in_channels=8, out_channels=8, dims=1, **small)
    ConsistencyModel(UNet(sound), representation=mdct).save(folder / "sound")
    ConsistencyModel(UNet(sound)).save(folder / "waves")
    latents = UNetConfig(image_size=8, in_channels=4, out_channels=4, **small)
    ConsistencyModel(UNet(latents)).save(folder / "latents")
    video = UNetConfig(image_size=(4, 8, 8), in_channels=1, out_channels=1, dims=3, patch_size=2, **small)
    ConsistencyModel(UNet(video)).save(folder / "video")
    return folder


def test_sounds_are_written_as_wav_and_spectrograms(cmfast, folder, tmp_path):
    status, out, err = cmfast("sample", "--model", folder / "sound", "--count", 5, "--out", tmp_path / "a.wav")
    assert status == 0, err
    assert f"{tmp_path / 'a.wav'}: 5 samples" in out
    model = load(folder / "sound")
    expected = model.representation.decode(model.sample(5))[:, 0].clamp(-1, 1)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert len(values) == 5 * 80 + 4 * 800
    sounds = np.stack([values[i * 880 : i * 880 + 80] for i in range(5)])
    np.testing.assert_allclose(sounds, expected.numpy(), atol=2e-5)
    assert not values[80:880].any()
    assert cmfast("sample", "--model", folder / "sound", "--count", 5, "--out", tmp_path / "a.png")[0] == 0
    assert Image.open(tmp_path / "a.png").size == (450, 380)  # a class a column, in turn
    assert cmfast("sample", "--model", folder / "waves", "--count", 2, "--out", tmp_path / "b.png")[0] == 0
    assert Image.open(tmp_path / "b.png").size == (800, 240)  # channels over time


def test_clips_are_written_as_animations(cmfast, folder, tmp_path):
    for name in ("a.gif", "A.APNG"):
        status, _, err = cmfast("sample", "--model", folder / "video", "--count", 5, "--out", tmp_path / name)
        assert status == 0, err
        picture = Image.open(tmp_path / name)
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)  # a class a column, in turn
        assert picture.n_frames == 4
    assert cmfast("sample", "--model", folder / "video", "--count", 5, "--out", tmp_path / "a.png")[0] == 0
    assert Image.open(tmp_path / "a.png").size == (4 * 64 + 4, 5 * 66 + 2)  # a clip a row


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("digits", "a.wav", r"a \.wav file is for sound, and digits draws images \[1, 8, 8\].* ends in \.png"),
        ("digits", "a.gif", r"a \.gif file is for video, and digits draws images"),
        ("sound", "a.gif", r"draws sound \[8, 10\]: give a name that ends in \.png or \.wav"),
        ("video", "a.wav", r"draws video \[1, 4, 8, 8\]: give a name that ends in \.png or \.gif or \.apng"),
        ("latents", "a.png", "latents draws samples of 4 channels, and pictures have 1 or 3"),
        ("waves", "a.wav", "does not say its sampling rate"),
        ("video", "a.mp4", r"must end in \.png, \.gif, \.apng, \.wav, or be a folder"),
    ],
)
def test_files_that_do_not_fit_the_model(cmfast, folder, tmp_path, model, name, message):
    source = folder / model if (folder / model).exists() else model
    status, _, err = cmfast("sample", "--model", source, "--count", 2, "--out", tmp_path / name)
    assert status == 2
    assert not list(tmp_path.iterdir())
    assert re.search(message, " ".join(err.split()).replace("│ ", ""))
