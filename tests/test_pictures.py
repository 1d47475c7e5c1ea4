import io

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.pictures import encode_png, grid, save_png, to_pixels


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
