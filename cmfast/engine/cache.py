"""Packed weights in a folder: a file for each network and dtype of products, named by a checksum of the weights."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole_file
from ..kernels import native
from ..kernels.cpu import memory

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def fingerprint(tensors: Mapping[str, Tensor], products: torch.dtype) -> str:
    """A name for what is packed of these tensors by this version of cmfast, from their names, shapes and contents."""
    names = hashlib.sha256(f"{metadata.version('cmfast')} {products}".encode())
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        sum_ = native.cpu().checksum(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
        names.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {sum_}".encode())
    return names.hexdigest()[:32]


def read(path: Path) -> dict[str, Tensor]:
    """The packed weights in a file; none where there is no such file.

    Raises:
        ValueError: the file is not one that `write` wrote, or not whole.
    """
    if not path.exists():
        return {}
    try:
        return _read(path)
    except (safetensors.SafetensorError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of packed weights ({error}): delete it") from error


def _read(path: Path) -> dict[str, Tensor]:
    """By all threads at once, straight into memory of huge pages: the file is larger than the network's own."""
    with safetensors.safe_open(path, "pt") as file:  # checks that the file is whole
        names = file.keys()
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        found = {}
        places = []
        for name in names:
            begin, end = header[name]["data_offsets"]
            raw = memory.empty(end - begin)
            found[name] = raw.view(_DTYPES[header[name]["dtype"]])
            places.append((raw, 8 + size + begin))
        with concurrent.futures.ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(lambda place: _fill(stream.fileno(), *place), places):
                pass
    return found


def _fill(file: int, raw: Tensor, begin: int) -> None:
    target = memoryview(raw.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], begin + done)
        if not count:
            raise EOFError("it ends too soon")
        done += count


def write(path: Path, packed: Mapping[str, Tensor]) -> None:
    """Write packed weights, whole or not at all."""
    with whole_file(path) as file:
        save_file(dict(packed), file)
