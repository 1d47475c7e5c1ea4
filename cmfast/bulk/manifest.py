"""The manifest of a run: what its samples depend on. It is written before them, and later processes must agree."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..environment import commit, processor
from ..files import held
from ..kernels import native
from .unfinished import is_unfinished, workplace

NAME = "manifest.json"
#: Of what this file says and how the shards are made: a folder of another one is not continued.
_FORMAT = "cmfast samples 1"


def weights_checksum(network: nn.Module) -> str:
    """SHA-256 of a network's configuration and state_dict: names, dtypes, shapes and values, in the order of names.

    Raises:
        ValueError: the network has given up its weights.
    """
    total = hashlib.sha256()
    config = getattr(network, "config", None)
    if dataclasses.is_dataclass(config):
        total.update(json.dumps(dataclasses.asdict(config), sort_keys=True, default=str).encode())  # type: ignore[arg-type]
    for name, value in sorted(network.state_dict().items()):
        if value.is_meta:
            raise ValueError("this model gave up its weights when it was accelerated (keep_weights=False)")
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"


def made_by(device: torch.device) -> dict[str, Any]:
    """The versions and the hardware that round as they do: with others, samples may differ in their last bits."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        isa = native.cpu().build_info()["isa"] if _has_kernels() else "no kernels"
        hardware = f"{processor()}, {isa}"
    return {"cmfast": metadata.version("cmfast"), "commit": commit(), "torch": torch.__version__, "hardware": hardware}


def begin(folder: Path, settings: Mapping[str, Any], maker: Mapping[str, Any]) -> list[str]:
    """Write the manifest into a new or empty folder; in one that has it, compare.

    Args:
        folder: of the run; made where it is missing.
        settings: what the samples and files are a function of.
        maker: as `made_by` gives it.

    Returns:
        In what the maker differs from the one that wrote the manifest, a line each.

    Raises:
        ValueError: the folder has samples of other settings (the message says which), or a damaged manifest.
        FileExistsError: the folder has files and no manifest.
        OSError: the folder cannot be made or written to.
    """
    path = folder / NAME
    mine = {"format": _FORMAT, "settings": dict(settings), "made_by": dict(maker)}
    mine = json.loads(json.dumps(mine))  # tuples are lists there
    if not path.exists():
        _write(path, mine)
    there = _read(path)
    if there["format"] != _FORMAT:
        raise ValueError(f"{path} is a manifest of the format {there['format']!r}, this version has {_FORMAT!r}")
    if wrong := _differences(there["settings"], mine["settings"]):
        raise ValueError(f"{folder} has samples of other settings: {'; '.join(wrong)}")
    return _differences(there["made_by"], mine["made_by"])


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Only where there is none: of several processes that write it, the first one counts."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the folder cannot be made ({error.strerror})", str(path.parent)) from error
    foreign = [entry.name for entry in path.parent.iterdir() if not is_unfinished(entry.name)]
    if foreign and NAME not in foreign:
        raise FileExistsError(
            f"{path.parent} has other files ({min(foreign)}) and no {NAME}: give a new or empty folder"
        )
    with workplace(path.parent) as unfinished:
        draft = unfinished / NAME
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            _rename(draft, path)


def _rename(draft: Path, path: Path) -> None:
    """Where there is nothing yet: one process at a time looks, and renames."""
    for _ in range(100):
        try:
            lock = held(path.parent)
        except BlockingIOError:
            time.sleep(0.1)
            continue
        try:
            if not path.exists():
                draft.rename(path)
            return
        finally:
            os.close(lock)
    raise BlockingIOError(f"{path.parent}: another process has held the folder for ten seconds")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: content[name] for name in ("format", "settings", "made_by")}
        if not isinstance(found["settings"], dict) or not isinstance(found["made_by"], dict):
            raise TypeError("settings and made_by must be objects")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest written by cmfast: {error!r}") from error


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = [*there, *(name for name in here if name not in there)]
    return [f"{n} {there.get(n)} there, {here.get(n)} here" for n in names if there.get(n) != here.get(n)]


def _has_kernels() -> bool:
    try:
        native.cpu()
    except ImportError:
        return False
    return True
