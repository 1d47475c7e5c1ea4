import io

import numpy as np
import pytest
from PIL import Image

from cmfast.bulk import png


def drawn(shape, seed=0):
    """Images that are smooth, as pictures are, with flat and noisy rows among them."""
    random = np.random.default_rng(seed)
    steps = random.normal(0, 6, shape)
    images = np.cumsum(np.cumsum(steps, -1), -2) + 128
    images[..., ::5, :] = 7
    images[..., 1::7, :] = random.integers(0, 256, images[..., 1::7, :].shape)
    return images.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "shape", [(3, 1, 8, 8), (2, 3, 8, 8), (70, 1, 16, 16), (2, 3, 33, 17), (1, 1, 1, 1), (2, 3, 1, 300)]
)
def test_pillow_reads_what_was_written(shape):
    images = drawn(shape)
    files = png.encode(images)
    assert len(files) == len(images)
    for image, data in zip(images, files, strict=True):
        read = Image.open(io.BytesIO(data))
        read.load()
        assert read.mode == ("L" if shape[1] == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(read).reshape(*shape[2:], shape[1]), image.transpose(1, 2, 0))


def test_all_filters_are_chosen_where_they_are_best():
    import zlib

    smooth = drawn((1, 3, 64, 64))
    data = zlib.decompress(png.encode(smooth)[0].split(b"IDAT")[1][:-16])
    assert set(np.frombuffer(data, np.uint8).reshape(64, -1)[:, 0]) == {0, 1, 2, 4}


def test_a_smooth_image_is_no_larger_than_pillows():
    image = np.indices((64, 64)).sum(0).astype(np.uint8)[None, None]
    theirs = io.BytesIO()
    Image.fromarray(image[0, 0]).save(theirs, format="PNG")
    assert len(png.encode(image)[0]) <= 1.05 * len(theirs.getvalue())
