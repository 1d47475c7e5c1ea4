"""Folders of image files: a sub-folder is a class; without sub-folders, the images have none."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ...pictures import read_image
from .dataset import Dataset

#: What image files end in.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


def load_folder(path: Path, size: int | None = None, say: Callable[[str], None] = lambda line: None) -> Dataset:
    """Read a folder of images through Pillow, as uint8.

    The classes are the sub-folders in the order of their names; each is searched at any depth. The data set is grey
    where all images are, and else RGB. Images are turned as their EXIF says and laid over white where they are
    transparent. Hidden files, and those whose names do not end as images' do (`SUFFIXES`), are left out.

    Args:
        path: of the folder.
        size: cut each image to the square in its middle and resize it to so many pixels (bicubic, with antialiasing);
            None takes the images as they are, which must then all have the same size.
        say: is told in a line each what was done to the images or left out.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: there are no images, or some are damaged or of different sizes. The message names the file.
    """
    files, labels, names = _listed(path, say)
    headers = [_header(file) for file in files]  # these first: most of what is wrong shows before the long part
    (height, width), _ = headers[0]
    for file, (found, _) in zip(files, headers, strict=True):
        if size is None and found != (height, width):
            raise ValueError(
                f"{file} has {found[1]} x {found[0]} pixels, {files[0].name} has {width} x {height}: give a size, to "
                "which all are cut and resized"
            )
    if size is not None:
        height = width = size
        if changed := sum(found != (size, size) for found, _ in headers):
            say(f"{changed} of {len(files)} images are cut to the square in the middle and resized to {size} x {size}")
    channels = 1 if all(grey for _, grey in headers) else 3
    pixels = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
    for file, image in zip(files, pixels, strict=True):
        try:
            values, _ = read_image(file, channels, (height, width))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{file} is not a whole image: {error}") from error
        image.copy_(torch.round((values + 1.0) * 127.5))
    return Dataset(pixels, torch.tensor(labels), names)


def _listed(path: Path, say: Callable[[str], None]) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """The image files, their classes, and the classes' names."""

    def images(folder: Path, depth: int | None = None) -> list[Path]:
        found = [p for p in _files(folder, depth) if not _hidden(p.relative_to(path))]
        if broken := [p for p in found if not p.is_file()]:
            say(f"{len(broken)} links of {folder} lead to no file and are left out, such as {broken[0].name}")
            found = [p for p in found if p.is_file()]
        others = [p for p in found if p.suffix.lower() not in SUFFIXES]
        if others:
            say(f"{len(others)} files of {folder} are not images and are left out, such as {others[0].name}")
        return [p for p in found if p.suffix.lower() in SUFFIXES]

    folders = sorted(p for p in path.iterdir() if p.is_dir() and not _hidden(p.relative_to(path)))
    flat = images(path, depth=1)
    if not folders:
        if not flat:
            raise ValueError(f"{path} has no images: expected sub-folders of images, one a class, or images")
        return flat, [0] * len(flat), ()
    if flat:
        raise ValueError(
            f"{path} has sub-folders, which are classes, and images beside them, such as {flat[0].name}: expected one "
            "or the other"
        )
    if len(folders) == 1:
        say(f"{path} has one class alone, {folders[0].name}: a model has no classes unless its network asks for one")
    by_class = [images(folder) for folder in folders]
    for folder, found in zip(folders, by_class, strict=True):
        if not found:
            raise ValueError(f"{folder} has no images: expected some in each sub-folder, which are the classes")
    labels = [label for label, found in enumerate(by_class) for _ in found]
    return [file for found in by_class for file in found], labels, tuple(folder.name for folder in folders)


def _files(folder: Path, depth: int | None) -> list[Path]:
    """What is no folder, so many levels below one, or at any depth; folders behind links too, each once."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        if here.resolve() in seen or (depth is not None and len(here.relative_to(folder).parts) + 1 >= depth):
            folders.clear()
        if here.resolve() not in seen:
            found += [here / name for name in files]
        seen.add(here.resolve())
        folders.sort()
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _says_orientation(file: Path) -> bool:
    """Whether a PNG has a chunk that may say how it is turned; it may stand behind the pixels."""
    with file.open("rb") as png:
        png.seek(8)
        while len(head := png.read(8)) == 8 and head[4:] != b"IEND":
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            start = png.read(min(size, 22))
            if kind == b"eXIf" or start.startswith((b"XML:com.adobe.xmp", b"Raw profile type exif")):
                return True
            png.seek(size - len(start) + 4, os.SEEK_CUR)
    return False


def _header(file: Path) -> tuple[tuple[int, int], bool]:
    """((height, width), whether it is grey) of an image file, without its pixels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("folders of images are read by Pillow: pip install pillow") from error
    try:
        with Image.open(file) as image:
            told = image.format != "PNG" or _says_orientation(file)  # asking a PNG reads its pixels
            turned = told and image.getexif().get(_ORIENTATION, 1) >= 5
            grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
            return image.size if turned else (image.height, image.width), grey
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not an image that Pillow can read: {error}") from error
