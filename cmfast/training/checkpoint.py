"""The files from which a training goes on: a folder each, whole or not there."""

import functools
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import CheckpointError
from ..checkpoints.tensors import read_json, read_safetensors, write_json, write_safetensors
from ..environment import processor
from ..files import whole_folder

TENSORS, DESCRIPTION = "training.safetensors", "training.json"


def write(
    folder: Path, iteration: int, tensors: Mapping[str, Tensor], description: Mapping[str, Any], keep: int
) -> None:
    """Write the checkpoint after so many updates, and then remove all but the last `keep` of the folder.

    It appears under its name when it is whole: a process that is killed leaves the ones before it.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    with whole_folder(folder / f"{iteration:09d}") as temporary:
        write_safetensors(temporary / TENSORS, apart(tensors))
        write_json(temporary / DESCRIPTION, description)
    remove_old(folder, keep)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    for old in list(found(folder).values())[:-keep]:
        old = old.rename(old.with_name(f".{old.name}-old"))  # what is half removed has no checkpoint's name
        shutil.rmtree(old)


def found(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their updates, the last one last."""
    return {int(path.name): path for path in sorted(folder.glob("[0-9]*")) if path.name.isdecimal()}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name in (TENSORS, DESCRIPTION):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is not the checkpoint of a training: {name} is missing")
    return read_safetensors(path / TENSORS), read_json(path / DESCRIPTION)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in folder.glob(".[0-9]*-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def versions() -> Mapping[str, str]:
    """The versions that the bits of a result depend on, and the processor and its threads."""
    return {**_installed(), "processor": processor(), "threads": str(torch.get_num_threads())}


@functools.cache
def _installed() -> Mapping[str, str]:
    names = ("cmfast", "torch", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two descriptions, such as "loop.seed is 1, was 0"."""
    old, new = dict(_flat(before)), dict(_flat(now))
    nothing = "not there"
    return [
        f"{name} is {new.get(name, nothing)}, was {old.get(name, nothing)}"
        for name in sorted({*old, *new})
        if old.get(name, nothing) != new.get(name, nothing)
    ]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in the same memory, as safetensors files have them."""
    result: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(inner) if isinstance(inner, tuple) else inner
