"""The formats of a shard: which samples each can hold, the shard's name, and how it is written.

A file depends on the samples alone: no time, user or order of a file system is in it.
"""

import dataclasses
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import whole_file, whole_folder
from ..pictures import encode_png
from .shards import Shard, Shards

#: `map`, or the map of a pool of threads.
Map = Callable[..., Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Block:
    """The samples of a shard.

    Attributes:
        shard: which samples they are.
        samples: [N, C, *spatial], uint8 or float32.
        labels: the class of each; None for an unconditional model.
        seed: of the noise.
        digits: of a sample's index in names.
    """

    shard: Shard
    samples: np.ndarray
    labels: Sequence[int] | None
    seed: int
    digits: int

    def name(self, i: int) -> str:
        """Of the i-th sample: its index in the run."""
        return f"{self.shard.first_sample + i:0{self.digits}}"


def write_npz(path: Path, block: Block, within: Path, mapped: Map) -> None:
    """One file of numpy's: `samples` [N, C, *spatial] and, where there are classes, `labels` int64 [N]."""
    arrays = {"samples": block.samples}
    if block.labels is not None:
        arrays["labels"] = np.array(block.labels, np.int64)
    with whole_file(path, within) as temporary, temporary.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:  # np.savez does the same, with whatever date zipfile takes
            for name, array in arrays.items():
                entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                with archive.open(entry, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
        _flush(file)


def write_png(path: Path, block: Block, within: Path, mapped: Map) -> None:
    """A folder of PNGs, each by its sample's index; `metadata.csv` has the classes (Hugging Face's imagefolder)."""
    with whole_folder(path, within) as folder:
        for i, data in enumerate(mapped(_png, block.samples)):
            (folder / f"{block.name(i)}.png").write_bytes(data)
        if block.labels is not None:
            rows = (f"{block.name(i)}.png,{label}\n" for i, label in enumerate(block.labels))
            (folder / "metadata.csv").write_text("file_name,label\n" + "".join(rows))


def write_tar(path: Path, block: Block, within: Path, mapped: Map) -> None:
    """One tar as WebDataset reads it: of each sample its PNG (or numpy array), class (`cls`) and origin (`json`)."""
    pictures = is_picture(block.samples.shape[1:], block.samples.dtype.name)
    suffix, encode = ("png", _png) if pictures else ("npy", _npy)
    with whole_file(path, within) as temporary, temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for i, data in enumerate(mapped(encode, block.samples)):
                about = {"index": block.shard.first_sample + i, "seed": block.seed}
                _add(archive, f"{block.name(i)}.{suffix}", data)
                if block.labels is not None:
                    about["label"] = block.labels[i]
                    _add(archive, f"{block.name(i)}.cls", str(block.labels[i]).encode())
                _add(archive, f"{block.name(i)}.json", json.dumps(about).encode())
        _flush(file)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file of user 0, time 0 and mode 644, as TarInfo has them."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _png(image: np.ndarray) -> bytes:
    """The PNG file of an image, uint8 [1 or 3, H, W]."""
    return encode_png(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def _npy(sample: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(sample), allow_pickle=False)
    return stream.getvalue()


def _flush(file: BinaryIO) -> None:
    """Have the content on the disk before the file gets its name, so that a power failure leaves no empty file."""
    file.flush()
    os.fsync(file.fileno())


@dataclasses.dataclass(frozen=True)
class Format:
    """What a shard is written as.

    Attributes:
        write: writes a block to a path, whole or not at all; its temporary files are in a folder that is given.
        suffix: of a shard's name; "" for a folder.
        pictures: whether it holds nothing but uint8 images.
        numbered: whether shards are numbered; else their names are the indices of the first and the last sample.
    """

    write: Callable[[Path, Block, Path, Map], None]
    suffix: str
    pictures: bool = False
    numbered: bool = False

    def name(self, shard: Shard, shards: Shards) -> str:
        """A shard's file or folder in the folder of its run."""
        if self.numbered:  # WebDataset's brace notation wants numbers without gaps
            return f"shard-{shard.index:0{max(6, len(str(len(shards) - 1)))}}{self.suffix}"
        digits = digits_of(shards)
        return f"{shard.first_sample:0{digits}}-{shard.last_sample:0{digits}}{self.suffix}"


FORMATS = {
    "npz": Format(write_npz, ".npz"),
    "png": Format(write_png, "", pictures=True),
    "tar": Format(write_tar, ".tar", numbered=True),
}

#: How samples are kept: as pixels, 0 for -1 and 255 for 1, or as they are.
DTYPES = ("uint8", "float32")


def digits_of(shards: Shards) -> int:
    """So many digits have the indices of samples in names, the same in the whole run."""
    return max(8, len(str(shards.first_sample + shards.samples - 1)))


def is_picture(sample_shape: Sequence[int], dtype: str) -> bool:
    """Whether a sample [C, *spatial] can be a PNG."""
    return len(sample_shape) == 3 and sample_shape[0] in (1, 3) and dtype == "uint8"


def dtype_of(name: str, sample_shape: Sequence[int], dtype: str | None) -> str:
    """What samples [C, *spatial] are kept as in a format: what was asked for, else uint8 for images and videos.

    Raises:
        ValueError: there is no such format or dtype, or the format cannot hold such samples.
    """
    if name not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {name!r}")
    visible = len(sample_shape) >= 3 and sample_shape[0] in (1, 3)
    dtype = dtype or ("uint8" if visible else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"samples are kept as {' or '.join(DTYPES)}, got {dtype!r}")
    if dtype == "uint8" and not visible:
        raise ValueError(f"uint8 is for images and videos of 1 or 3 channels, not for samples {list(sample_shape)}")
    if FORMATS[name].pictures and not is_picture(sample_shape, dtype):
        raise ValueError(
            f"the format {name} holds uint8 images [1 or 3, H, W], not {dtype} samples {list(sample_shape)}: "
            f"take {' or '.join(other for other in FORMATS if not FORMATS[other].pictures)}"
        )
    return dtype
