"""The formats: which one a path has, and reading and writing each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import whole_folder
from ..preconditioning import Preconditioning
from . import diffusers, folder, openai
from .checkpoint import Checkpoint, CheckpointError
from .tensors import read_json

#: Names of the formats.
FORMATS = ("openai", "diffusers", "cmfast")


def format_of(path: Path) -> str:
    """The format of a file or folder, one of `FORMATS`; a folder's is told by its configurations.

    Raises:
        FileNotFoundError: the folder has no configuration.
        CheckpointError: it is another library's, or of a class that cmfast cannot read.
    """
    if not path.is_dir():
        return "openai"
    if not (path / diffusers.INDEX).is_file():
        content = read_json(path / folder.CONFIG)
        if content.get("format") == "cmfast":
            return "cmfast"
        if "_class_name" not in content:
            raise CheckpointError(f"{path / folder.CONFIG} is not a configuration written by cmfast or diffusers")
    diffusers.network_folder(path)
    return "diffusers"


def says_preconditioning(path: Path) -> bool:
    """Whether a file or folder says its model's preconditioning: a network's alone does not.

    Raises:
        FileNotFoundError: the folder has no configuration.
        CheckpointError: as `format_of`.
    """
    kind = format_of(path)
    return kind == "cmfast" or (kind == "diffusers" and diffusers.network_folder(path) != path)


def read(
    path: Path,
    preconditioning: Preconditioning | None = None,
    *,
    variant: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Read a file or folder of any format.

    Args:
        path: that exists.
        preconditioning: takes the place of the file's own.
        variant: of diffusers' weights, such as "fp16".
        config: fields of UNetConfig that the file does not determine.

    Raises:
        FileNotFoundError: files are missing.
        CheckpointError: files are damaged or another model's.
        ValueError: an argument that the format has no use for.
    """
    kind, config = format_of(path), dict(config or {})
    if variant is not None and kind != "diffusers":
        raise ValueError(f"{path} has no variants: variant={variant!r} is for folders of diffusers")
    if kind == "openai":
        return openai.read(path, preconditioning, config)
    if unused := set(config) - ({"image_size"} if kind == "diffusers" else set()):
        raise ValueError(
            f"{path} has its configuration in {folder.CONFIG}: {', '.join(sorted(unused))} cannot be given"
        )
    if kind == "diffusers":
        return diffusers.read(path, preconditioning, variant, **config)
    return folder.read(path, preconditioning)


def write(checkpoint: Checkpoint, path: Path, kind: str) -> None:
    """Write a file or a new folder of a format, whole or not at all.

    Args:
        checkpoint: its tensors are written as they are, to the bit.
        path: of the file or folder.
        kind: one of `FORMATS`.

    Raises:
        ValueError: there is no such format, or it cannot express the model; the message says what.
        FileExistsError: a folder is there and not empty.
        OSError: the file or folder cannot be written.
    """
    if kind == "openai":
        openai.write(checkpoint, path)
    elif kind == "diffusers":
        diffusers.write(checkpoint, path)
    elif kind == "cmfast":
        with whole_folder(path) as temporary:
            folder.write(checkpoint, temporary)
    else:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {kind!r}")
