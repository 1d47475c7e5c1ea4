"""Files of tensors: safetensors in and out, and PyTorch's own, read with nothing but tensors unpickled."""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import CheckpointError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    They stay in the file until they are used: another file may take its place, but none be written over it.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is truncated or another format's.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, and what the file says beside them."""
    with path.open("rb"):  # of one that cannot be read, safetensors says that it is not there
        pass
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors on the CPU as a safetensors file; those that share memory are written each.

    Raises:
        OSError: the file cannot be written, the disk is full; without the path, which `whole_file` and `whole_folder`
            put in: this one is temporary.
    """
    apart, seen = {}, set()
    for name, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if storage in seen else value.contiguous()
        seen.add(storage)
    try:
        save_file(apart, path, metadata)
    except safetensors.SafetensorError as error:
        number = re.search(r"^.*?I/O error: (.*) \(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[2]), number[1]) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that torch.save wrote.

    Raises:
        CheckpointError: the file is truncated, or holds something else than a dict of tensors; nothing of it was run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error below
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something else than tensors (or is no checkpoint); it was not loaded, "
            "since unpickling it could run code"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise CheckpointError(f"{path} is not a whole PyTorch file: {first_line(error)}") from error
    named = isinstance(weights, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())
    if not named or not weights:
        raise CheckpointError(f"{path} does not hold a state_dict (names to tensors) but {_kind(weights)}")
    return weights


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index beside them (`*.index.json`) lists, as Hugging Face's libraries write it.

    Raises:
        FileNotFoundError: a file of the index is missing.
        CheckpointError: the index is not one, or the files hold other tensors than it says.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()) or not listed:
        raise CheckpointError(f"{index} is not an index of weights: it has no weight_map of names to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        path = index.parent / name
        if path.parent != index.parent:
            raise CheckpointError(f"{index} names the file {name}, which is not beside it")
        if not path.is_file():
            raise FileNotFoundError(f"{index} names the file {name}, which is missing")
        tensors |= read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if set(tensors) != set(listed):
        wrong = sorted(set(tensors) ^ set(listed))
        raise CheckpointError(f"{index} and its files disagree about {len(wrong)} tensors, such as {wrong[0]}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model in the folder {path.parent}: {path.name} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a configuration: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a configuration: expected a JSON object, got {_kind(value)}")
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON that is read easily."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(map(str, list(value)[:5]))}" if value else "an empty dict"
    return f"a {type(value).__name__}"
