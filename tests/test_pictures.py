import io

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.pictures import encode_png, grid, save_animation, save_png, save_spectrograms, to_pixels
from cmfast.sound import save_wav


def test_grid_places_each_sample():
    samples = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).expand(6, 1, 64, 64)
    picture = grid(samples, columns=3, margin=2)
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert picture.dtype == np.uint8
    for i in range(6):
        cell = picture[2 + (i // 3) * 66 :, 2 + (i % 3) * 66 :][:64, :64]
        assert (cell == round((samples[i, 0, 0, 0].item() + 1) * 127.5)).all()
    assert (picture[:2] == 255).all()


def test_small_images_are_enlarged():
    assert grid(torch.zeros(1, 3, 8, 8), margin=0).shape == (64, 64, 3)


def test_shapes_of_grids():
    """About square, a row of frames a video, never more columns than samples; enlarged by a whole factor."""
    for shape, options, size in (
        ((5, 1, 64, 64), {}, (2 * 66 + 2, 3 * 66 + 2)),
        ((4, 3, 64, 64), {}, (2 * 66 + 2, 2 * 66 + 2)),
        ((2, 1, 64, 64), {"columns": 7}, (66 + 2, 2 * 66 + 2)),
        ((2, 1, 3, 64, 64), {"margin": 0}, (128, 192)),
        ((2, 1, 3, 64, 64), {"margin": 0, "columns": 2}, (64, 384)),
        ((1, 1, 64, 100), {"margin": 0}, (64, 100)),
        ((1, 1, 63, 100), {"margin": 0}, (126, 200)),
        ((1, 1, 30, 20), {"margin": 1}, (30 * 4 + 2, 20 * 4 + 2)),
        ((1, 1, 70, 80), {"margin": 0}, (70, 80)),
    ):
        assert grid(torch.zeros(shape), **options).shape == (*size, 3)


def test_frames_lie_side_by_side():
    video = torch.linspace(-1, 1, 3).reshape(1, 1, 3, 1, 1).expand(1, 1, 3, 64, 64)
    assert grid(video, margin=0)[10, 10::64, 0].tolist() == [0, 128, 255]


def test_colours_and_clipping():
    sample = torch.tensor([2.0, 0.0, -2.0]).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert grid(sample, margin=0)[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(("shape", "size"), [((4, 3, 16, 16), (134, 134)), ((2, 1, 5, 32, 32), (324, 134))])
def test_png(tmp_path, shape, size):
    save_png(torch.randn(shape), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == size


def test_waveforms(tmp_path):
    save_png(torch.randn(2, 1, 100), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (800, 240)  # a strip a sample


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (0, 1, 8, 8), (1, 8)])
def test_shapes_that_are_no_pictures(shape):
    with pytest.raises(ValueError, match="expected samples"):
        grid(torch.zeros(shape))


@pytest.mark.parametrize("suffix", ["gif", "apng"])
def test_clips_move(tmp_path, suffix):
    clips = torch.linspace(-1, 1, 12).reshape(4, 1, 3, 1, 1).expand(4, 1, 3, 32, 32)
    save_animation(clips, tmp_path / f"a.{suffix}", columns=4, seconds=0.05)
    picture = Image.open(tmp_path / f"a.{suffix}")
    assert (picture.n_frames, picture.info["loop"]) == (3, 0)
    for i in range(3):
        picture.seek(i)
        assert picture.info["duration"] == 50
        pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape == (66 + 2, 4 * 66 + 2, 3)
        found = pixels[20, 20::66, 0].astype(int)
        assert np.abs(found - grid(clips[:, :, i], columns=4)[20, 20::66, 0]).max() <= 1


def test_what_does_not_move(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.gif or \.apng"):
        save_animation(torch.zeros(1, 1, 2, 8, 8), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"expected clips .*, got \[1, 1, 8, 8\]"):
        save_animation(torch.zeros(1, 1, 8, 8), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_spectrograms(tmp_path):
    """A tone of a quarter of the highest frequency lights up a quarter of the way up."""
    t = torch.arange(4000) / 8000
    tones = torch.sin(2 * torch.pi * 1000 * t).repeat(3, 1, 1)
    save_spectrograms(tones, tmp_path / "a.png", 8000, columns=2)
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.size == (300, 380)
    bright = np.asarray(picture, int).sum(2)[60:150, 200:280]  # inside the second one's spectrogram
    light = bright.mean(1) > 300
    middle = 60 + np.flatnonzero(light).mean()
    assert 0 < light.sum() < 25
    assert 110 < middle < 150
    with pytest.raises(ValueError, match=r"expected sounds \[N, 1, L\], got \[3, 4000\]"):
        save_spectrograms(tones[:, 0], tmp_path / "b.png", 8000)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 5, 3), (31, 33), (40, 7, 3), (40, 40), (64, 48, 3)], ids=str)
def test_encoded_pictures(shape):
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for each in (picture, picture[::-1]):  # of any strides
        image = Image.open(io.BytesIO(encode_png(each)))
        assert image.mode == ("L" if len(shape) == 2 else "RGB")
        np.testing.assert_array_equal(np.asarray(image), each)


def test_a_grid_of_pixels():
    samples = torch.linspace(-1, 1, 5 * 3 * 4 * 4).reshape(5, 3, 4, 4)
    np.testing.assert_array_equal(grid(to_pixels(samples)), grid(samples))


@pytest.mark.parametrize("write", [save_png, save_animation, save_wav])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_no_number_is_not_drawn(tmp_path, write, value):
    shape, name = {"save_png": ((2, 1, 8, 8), "a.png"), "save_animation": ((2, 1, 3, 8, 8), "a.gif")}.get(
        write.__name__, ((2, 1, 16), "a.wav")
    )
    samples = torch.zeros(shape)
    samples[1, 0, 0] = float(value)
    with pytest.raises(FloatingPointError, match="1 of 2 samples are not finite"):
        write(samples, tmp_path / name, **({"sample_rate": 8000} if name == "a.wav" else {}))
    assert not list(tmp_path.iterdir())
