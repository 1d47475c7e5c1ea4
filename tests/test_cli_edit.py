"""Pictures of different sizes and modes through `cmfast edit`."""

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast import ConsistencyModel, preconditioning
from cmfast.pictures import read_image

from .fixture_files import tiny_unet


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A model of pictures with three channels, without classes."""
    folder = tmp_path_factory.mktemp("model") / "colours"
    unet = tiny_unet(in_channels=3, out_channels=3, num_classes=None)
    ConsistencyModel(unet, preconditioning.Consistency()).save(folder)
    return folder


def write(path, mode):
    """A picture with a light disk on a dark ground; of RGBA the ground is transparent."""
    y, x = np.mgrid[:60, :90]
    disk = ((y - 30) ** 2 + (x - 45) ** 2 < 20**2) * 200 + 20
    if mode == "16-bit grey":
        image = Image.fromarray((disk * 257).astype(np.uint16))
    elif mode == "RGBA":
        image = Image.fromarray(np.stack((disk, disk // 2, disk // 4, 255 * (disk > 100)), -1).astype(np.uint8))
    elif mode == "palette":
        image = Image.fromarray(disk.astype(np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        image = Image.fromarray(disk.astype(np.uint8))
    image.save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("mode", ["RGBA", "palette", "16-bit grey"])
def test_every_edit_of_every_kind_of_picture(mode, cmfast, tmp_path, colours):
    image = write(tmp_path / "given.png", mode)
    mask = np.zeros((60, 90), np.uint8)
    mask[:, :45] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = {
        "inpaint": ["--mask", tmp_path / "mask.png"],
        "colorize": [],
        "super-resolve": ["--factor", 3],
        "strokes": ["--sigma", 1.5],
        "denoise": ["--sigma", 0.3],
    }
    for name, own in options.items():
        out, saved = tmp_path / f"{name}.png", tmp_path / f"{name}-only.png"
        arguments = ("--model", colours, "--image", image, "--out", out, "--save", saved, "--count", 2)
        status, said, error = cmfast("edit", name, *arguments, *own)
        assert status == 0, error
        assert "given.png: 90 x 60" in said
        assert "cut to 60 x 60, resized to" in said
        assert pixels(out).shape == (2 + 66, 3 * 66 + 2, 3)  # what was given and two results, 64 pixels and margins
        assert pixels(saved).shape == (8, 8, 3)
        first = pixels(out)[2:66, 68:132][4::8, 4::8]
        assert np.array_equal(first, pixels(saved))
    known, _ = read_image(image, 3, (8, 8))
    kept = pixels(tmp_path / "inpaint-only.png")[:, :4]
    assert np.array_equal(kept, ((known.movedim(0, 2)[:, :4] + 1) * 127.5).round().to(torch.uint8).numpy())


def test_interpolation_and_the_bundled_model(cmfast, tmp_path):
    status, said, error = cmfast("edit", "interpolate", "--count", 3, "--class", 4, "--out", tmp_path / "path.png")
    assert status == 0, error
    assert "3 results of evaluations at 1 level" in said
    other = tmp_path / "samples.png"
    assert cmfast("sample", "--count", 2, "--class", 4, "--out", other, "--no-progress")[0] == 0
    ends, drawn = pixels(tmp_path / "path.png"), pixels(other)
    assert np.array_equal(ends[:, :66], drawn[:, :66])
    assert np.array_equal(ends[:, -66:], drawn[:, -66:])
    assert not np.array_equal(ends[:, 66:132], drawn[:, 66:132])


def test_pictures_are_read_as_they_are_meant(tmp_path):
    deep = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found, said = read_image(tmp_path / "deep.png", 1, (4, 4))
    torch.testing.assert_close(found[0], torch.from_numpy(deep / 65535 * 2 - 1).float())
    assert said.endswith("4 x 4 I;16")
    clear = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 3, (4, 4))[0] == 1).all()  # over white
    turned = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4) * 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    found, _ = read_image(tmp_path / "turned.png", 1, (4, 2))
    torch.testing.assert_close((found[0, 0] + 1) * 127.5, torch.tensor([120.0, 0.0]), atol=1e-4, rtol=0)


def test_errors_say_what_to_mend(cmfast, tmp_path, colours, monkeypatch):
    image, out = write(tmp_path / "given.png", "grey"), tmp_path / "out.png"
    (tmp_path / "text.png").write_text("no picture")
    whole = image.read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:33] + (10).to_bytes(4, "big") + whole[37:])  # a shorter IDAT
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    inpaint = ("edit", "inpaint", "--image", image, "--out", out)
    for arguments, message in (
        (("edit", "strokes", "--image", tmp_path / "nothing.png", "--out", out), "nothing.png: No such file"),
        (("edit", "strokes", "--image", tmp_path / "text.png", "--out", out), "cannot identify image file"),
        (("edit", "strokes", "--image", tmp_path / "broken.png", "--out", out), "broken.png is damaged: broken PNG"),
        (("edit", "strokes", "--image", tmp_path / "float.tiff", "--out", out), "mode 'F' have no known range"),
        (("edit", "strokes", "--image", image, "--out", tmp_path / "out.gif"), "must end in .png"),
        (
            ("edit", "strokes", "--image", image, "--out", out, "--sigma", 0.001),
            "above 0.002 and at most 80, got 0.001",
        ),
        (("edit", "strokes", "--image", image, "--out", out, "--class", "10"), "0 … 9, got 10"),
        (("edit", "strokes", "--image", image, "--out", out, "--class", "1,2,3"), "one class or 1, got 1,2,3"),
        (("edit", "strokes", "--image", image, "--out", out, "--model", colours, "--class", 0), "has no classes"),
        (("edit", "colorize", "--image", image, "--out", out), "three channels; digits has 1"),
        ((*inpaint, "--mask", image), "black everywhere"),
    ):
        if message == "black everywhere":
            Image.new("L", (9, 9)).save(image)
        status, _, error = cmfast(*arguments)
        assert status == 2
        assert message in error, error
        assert len(error.splitlines()) == 1
        assert not out.exists()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "exceeds limit" in cmfast("edit", "strokes", "--image", image, "--out", out)[2]


def test_a_noisy_picture_in_the_terms_of_the_model(cmfast, tmp_path):
    """TrigFlow's samples are cos(t) times those of EDM: the same network takes the same noise out of a picture."""
    image, unet = write(tmp_path / "given.png", "grey"), tiny_unet()
    results = []
    for scheme in (preconditioning.EDM(), preconditioning.TrigFlow(network="edm")):
        name = type(scheme).__name__
        ConsistencyModel(unet, scheme).save(tmp_path / name)
        arguments = ("--image", image, "--sigma", 0.5, "--steps", 2, "--save", tmp_path / f"{name}.png")
        status, _, error = cmfast(
            "edit", "denoise", "--model", tmp_path / name, *arguments, "--out", tmp_path / "o.png"
        )
        assert status == 0, error
        results.append(pixels(tmp_path / f"{name}.png").astype(int))
    assert np.abs(results[0] - results[1]).max() <= 1
    assert results[0].std() > 10


@pytest.mark.parametrize(("name", "option"), [("colorize", "--steps"), ("strokes", "--sigma")])
def test_the_levels_are_given_once(name, option, cmfast, tmp_path, colours):
    image, out = write(tmp_path / "given.png", "grey"), tmp_path / "out.png"
    arguments = ("--model", colours, "--image", image, "--out", out, "--sigmas", "80,2")
    status, _, error = cmfast("edit", name, *arguments, option, 2)
    assert status == 2
    assert f"--sigmas are the levels themselves: leave out {option}" in error
    assert not out.exists()
    assert cmfast("edit", name, *arguments)[0] == 0
