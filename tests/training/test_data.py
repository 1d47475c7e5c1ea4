import gzip
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.training import Dataset, load_data, load_digits
from cmfast.training.data import fingerprint, load_fashion, scaled


def test_digits():
    train, test = load_digits()
    assert train.images.shape == (1438, 1, 8, 8)
    assert test.images.shape == (359, 1, 8, 8)
    assert (train.images.min(), train.images.max()) == (-1, 1)
    assert set(train.labels.tolist()) == set(range(10))
    assert train.num_classes == 10
    again, _ = load_digits()
    assert torch.equal(again.images, train.images)
    pictures = torch.cat((train.images, test.images)).flatten(1)
    assert len(pictures) == 1797
    assert not (train.images[:, None] == test.images[None, :50]).flatten(2).all(2).any()


def pixels(height=6, width=6, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_a_folder_of_classes(tmp_path):
    expected = []
    for i, name in enumerate(("cat/1.png", "cat/deeper/2.png", "dog/1.bmp")):
        write(tmp_path / name, pixels(seed=i))
        expected.append(torch.from_numpy(pixels(seed=i)).permute(2, 0, 1))
    (tmp_path / "dog" / "notes.txt").write_text("x")
    (tmp_path / "dog" / ".hidden.png").write_text("x")
    (tmp_path / ".git").mkdir()
    said = []
    found = load_data(tmp_path, say=said.append)
    assert found.images.dtype == torch.uint8
    assert torch.equal(found.images, torch.stack(expected))
    assert found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ("cat", "dog")
    assert found.num_classes == 2
    assert said == [f"1 files of {tmp_path / 'dog'} are not images and are left out, such as notes.txt"]
    low, high = scaled(found.images).aminmax()
    assert (low, high) == (2 * expected_low(expected) / 255 - 1, 2 * expected_high(expected) / 255 - 1)


def expected_low(images):
    return min(image.min().item() for image in images)


def expected_high(images):
    return max(image.max().item() for image in images)


def test_a_flat_folder_has_no_classes_and_stays_grey(tmp_path):
    for i in range(2):
        write(tmp_path / f"{i}.png", pixels(channels=1, seed=i))
    found = load_data(tmp_path)
    assert torch.equal(found.images[1, 0], torch.from_numpy(pixels(channels=1, seed=1)))
    assert found.labels.tolist() == [0, 0]
    assert found.num_classes is None
    write(tmp_path / "2.png", pixels())
    assert load_data(tmp_path).images.shape == (3, 3, 6, 6)  # one has colours


def test_one_class_tells_nothing(tmp_path):
    write(tmp_path / "only" / "1.png", pixels())
    said = []
    assert load_data(tmp_path, say=said.append).num_classes is None
    assert said == [f"{tmp_path} has one class alone, only: a model has no classes unless its network asks for one"]


def test_images_are_cut_and_resized_where_a_size_is_given(tmp_path):
    array = np.zeros((8, 16), np.uint8)
    array[:, 4:12] = 200  # the square in the middle
    write(tmp_path / "wide.png", array)
    write(tmp_path / "small.png", np.full((4, 4), 100, np.uint8))
    said = []
    found = load_data(tmp_path, size=4, say=said.append)
    assert found.images.tolist() == [[[[100] * 4] * 4], [[[200] * 4] * 4]]
    assert said == ["1 of 2 images are cut to the square in the middle and resized to 4 x 4"]
    np.savez(tmp_path / "a.npz", images=array[None])
    assert load_data(tmp_path / "a.npz", size=4).images.tolist() == [[[[200] * 4] * 4]]
    np.savez(tmp_path / "b.npz", images=array[None] / 400)
    resized = load_data(tmp_path / "b.npz", size=4, say=said.append).images
    torch.testing.assert_close(resized, torch.zeros(1, 1, 4, 4))
    assert said[-1] == "1 images of 16 x 8 are cut to the square in the middle, resized to 4"


def test_bad_folders_are_one_line_that_names_the_file(tmp_path):
    def refused(message):
        with pytest.raises((ValueError, OSError)) as error:
            load_data(tmp_path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    refused("has no images: expected sub-folders")
    (tmp_path / "a").mkdir()
    refused("a has no images: expected some in each")
    write(tmp_path / "a" / "1.png", pixels())
    write(tmp_path / "2.png", pixels())
    refused("images beside them, such as 2.png")
    (tmp_path / "2.png").unlink()
    write(tmp_path / "a" / "2.png", pixels(5, 6))
    refused("2.png has 6 x 5 pixels, 1.png has 6 x 6: give a size")
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    refused("2.png is not a whole image")
    (tmp_path / "a" / "2.png").write_bytes(b"nothing of an image")
    refused("2.png is not an image that Pillow can read")
    (tmp_path / "a" / "2.png").write_bytes(b"")
    refused("2.png is not an image that Pillow can read")
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_data(tmp_path / "b")
    with pytest.raises(ValueError, match="has no test split"):
        load_data(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"expected a folder of images, a \.npz file, or an IDX file"):
        load_data(tmp_path / "a" / "1.png")


@pytest.mark.parametrize(
    ("arrays", "images"),
    [
        ({"images": pixels(6, 5)[None], "labels": np.array([3])}, pixels(6, 5)[None].transpose(0, 3, 1, 2)),
        ({"arr_0": pixels(channels=1)[None], "arr_1": np.array([[3]], np.int32)}, pixels(channels=1)[None, None]),
        (
            {"x_train": pixels().transpose(2, 0, 1)[None], "y_train": [3], "x_test": []},
            pixels()[None].transpose(0, 3, 1, 2),
        ),
        ({"data": np.array([[[-1.0, 0.5]]]), "targets": [3]}, np.array([[[[-1.0, 0.5]]]], np.float32)),
        ({"data": np.array([[[0.0, 0.75]]], np.float16), "y": [3]}, np.array([[[[-1.0, 0.5]]]], np.float32)),
    ],
    ids=["last", "grey", "first", "float", "unit"],
)
def test_npz(tmp_path, arrays, images):
    np.savez(tmp_path / "a.npz", **arrays)
    found = load_data(tmp_path / "a.npz")
    assert found.images.numpy().dtype == images.dtype
    assert np.array_equal(found.images, images)
    assert found.labels.tolist() == [3]
    assert found.num_classes == 4
    np.savez(tmp_path / "a.npz", images=arrays[next(iter(arrays))])
    assert load_data(tmp_path / "a.npz").labels.tolist() == [0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weights": np.zeros(3)}, "has no images: its arrays are weights; expected one of train_images, x_train"),
        ({"images": np.zeros((2, 3), np.uint8)}, r"expected images \[M, H, W\]"),
        ({"images": np.zeros((2, 4, 4, 2), np.uint8)}, r"with C 1 or 3, got \[2, 4, 4, 2\]"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "there are no images"),
        ({"images": np.full((1, 2, 2), 255.0)}, r"expected pixels in \[-1, 1\] or \[0, 1\], or uint8, got 255 to 255"),
        ({"images": np.full((1, 2, 2), np.nan)}, "got nan to nan"),
        ({"images": np.zeros((1, 2, 2), np.int64)}, "expected uint8 or floating-point pixels, got int64"),
        ({"images": np.zeros((2, 2, 2), np.uint8), "labels": [1]}, r"expected 2 integers, .* got \[1\] int64"),
        ({"images": np.zeros((1, 2, 2), np.uint8), "labels": [0.5]}, r"expected 1 integers, .* float64"),
        ({"images": np.zeros((1, 2, 2), np.uint8), "labels": [-1]}, "labels count from 0, got -1"),
    ],
)
def test_npz_of_other_things(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_data(tmp_path / "a.npz")
    assert str(error.value).startswith(str(tmp_path / "a.npz"))


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=pixels()[None])
    for content in (path.read_bytes()[:-40], b"x", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is not a whole \.npz file"):
            load_data(path)
    with path.open("wb") as file:
        np.save(file, pixels())
    with pytest.raises(ValueError, match=r"a\.npz is not a whole \.npz file of numbers: it is a \.npy file"):
        load_data(path)
    np.savez_compressed(path, images=np.arange(3000, dtype=np.uint8).reshape(30, 10, 10))
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not a whole \.npz file"):
        load_data(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"text")
    with pytest.raises(ValueError, match="images are not arrays of numpy"):
        load_data(path)
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is not a whole \.npz file of numbers"):
        load_data(path)  # nothing is unpickled


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = np.stack([pixels(3, 4, 1, seed) for seed in range(5 if split == "train" else 2)])
        labels = np.arange(len(images), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
        for path in (tmp_path, tmp_path / f"{prefix}-images-idx3-ubyte{suffix}"):
            found = load_data(path, split=split)
            assert np.array_equal(found.images[:, 0], images)
            assert found.labels.tolist() == labels.tolist()
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'valid'"):
        load_data(tmp_path, split="valid")


def test_fashion(tmp_path):
    """Both splits, in [-1, 1], with the names of the classes; other images are refused."""

    def write_idx(height, classes):
        for prefix, count in (("train", 20), ("t10k", 10)):
            images = np.arange(count * height * 28, dtype=np.uint64).reshape(count, height, 28) % 256
            (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images.astype(np.uint8)))
            labels = np.arange(count, dtype=np.uint8) % classes
            (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))

    write_idx(28, 10)
    train, test = load_fashion(tmp_path)
    assert (train.images.shape, test.images.shape) == ((20, 1, 28, 28), (10, 1, 28, 28))
    assert train.images[0, 0, 0, :2].tolist() == pytest.approx([-1, 1 / 127.5 - 1])
    assert train.images.max() == 1
    assert train.labels[:11].tolist() == [*range(10), 0]
    assert (train.class_names[0], test.class_names[9]) == ("t-shirt", "ankle boot")
    for height, classes, message in ((27, 10, "1 x 28 x 28 in 10 classes, got 1 x 27 x 28 in 10"), (28, 9, "in 9")):
        write_idx(height, classes)
        with pytest.raises(ValueError, match=message):
            load_fashion(tmp_path)


def test_damaged_idx(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole = idx(np.zeros((2, 3, 4), np.uint8))

    def refused(content, message, label_content=None):
        images.write_bytes(content)
        if label_content is not None:
            labels.write_bytes(label_content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_data(tmp_path)

    refused(whole, "has no labels beside it: expected train-labels-idx1-ubyte or")
    refused(whole[:-1], "is not whole: its header says 2 x 3 x 4 bytes, it has 23", idx(np.zeros(2, np.uint8)))
    refused(b"", "it begins with nothing")
    refused(idx(np.zeros(2, np.uint8)), "with 3 dimensions: it begins with 00 00 08 01")
    refused(whole, "has 2 images, and train-labels-idx1-ubyte 1 labels", idx(np.zeros(1, np.uint8)))
    refused(idx(np.zeros((0, 3, 4), np.uint8)), "there are no images in it", idx(np.zeros(0, np.uint8)))
    with pytest.raises(FileNotFoundError, match="none of the test split"):
        load_data(tmp_path, split="test")
    images.unlink()
    images.with_name(images.name + ".gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        load_data(tmp_path)


def test_a_fingerprint_sees_every_value():
    images, labels = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    first = fingerprint([images, labels])
    assert first == fingerprint(Dataset(images.clone(), labels.clone())[:2])
    changed = images.clone()
    changed[3, 0, 1, 1] = 1e-30
    others = [[changed, labels], [images, labels + 1], [images.reshape(4, 2, 2, 1), labels], [images.half(), labels]]
    assert len({first, *map(fingerprint, others)}) == 5


def test_labels_that_are_no_classes(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.array([0, 1, 2, 3, 4, 10**13]))
    with pytest.raises(ValueError, match=r"these 6 go up to 10000000000000: .* number them anew"):
        load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([3, 999]))  # a part of ImageNet
    assert load_data(tmp_path / "b.npz").num_classes == 1000


def test_folders_and_files_behind_links(tmp_path):
    for folder in ("more", "data/cat", "data/dog"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "more" / "2.png")
    Image.new("L", (4, 4)).save(tmp_path / "data" / "cat" / "1.png")
    Image.new("L", (4, 4)).save(tmp_path / "data" / "dog" / "1.png")
    (tmp_path / "data" / "cat" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "cat" / "round").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "x.png").symlink_to(tmp_path / "nowhere.png")
    said = []
    data = load_data(tmp_path / "data", say=said.append)
    assert data.labels.tolist() == [0, 0, 1]
    assert said == [f"1 links of {tmp_path / 'data' / 'cat'} lead to no file and are left out, such as x.png"]


@pytest.mark.parametrize("behind", [False, True])
def test_images_are_turned_wherever_a_png_says_so(behind, tmp_path):
    image, exif = Image.new("L", (16, 8)), Image.Exif()
    exif[0x0112] = 6
    image.putdata(range(128))
    image.save(tmp_path / "a.png", exif=exif)
    if behind:
        data = (tmp_path / "a.png").read_bytes()
        at = data.index(b"eXIf") - 4
        size = 12 + int.from_bytes(data[at : at + 4], "big")
        chunk, rest = data[at : at + size], data[:at] + data[at + size :]
        end = rest.index(b"IEND") - 4
        (tmp_path / "a.png").write_bytes(rest[:end] + chunk + rest[end:])
    (found,) = load_data(tmp_path).images
    assert found.shape == (1, 16, 8)
    assert torch.equal(found[0].T.flip(1).flatten().sort().values, torch.arange(128, dtype=torch.uint8))
    assert found[0, 0].tolist() == [112 - 16 * i for i in range(8)]
