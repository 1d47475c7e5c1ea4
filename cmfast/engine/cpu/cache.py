"""Packed weights in a folder: a file for each network and dtype of products, named by a checksum of the weights."""

import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ...checkpoints.tensors import write_safetensors
from ...files import whole_file
from ...kernels import native
from ...kernels.cpu import memory
from ...kernels.cpu.conv import packing

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def fingerprint(tensors: Mapping[str, Tensor], packed: Iterable[str], products: torch.dtype) -> str:
    """A name for what is packed of these tensors: their names, shapes and contents, and what was computed of them.

    `packed` are the names of the weights that are packed, each an expression of the tensors. The version of cmfast and
    the name of the packing, which an instruction set may have of its own, are in it too.
    """
    names = hashlib.sha256(f"{metadata.version('cmfast')} {packing()} {products} {list(packed)}".encode())
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        sum_ = native.cpu().checksum(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
        names.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {sum_}".encode())
    return names.hexdigest()[:32]


class Stored:
    """The packed weights in a file that `write` wrote: each is read when it is wanted.

    Attributes:
        path: of the file; where there is none, there are no weights.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is not one of packed weights, or not whole."""
        self.path = path
        self._places: dict[str, tuple[torch.dtype, int, int]] = {}
        if not path.exists():
            return
        try:
            with safetensors.safe_open(path, "pt") as file:  # checks that the file is whole
                names = file.keys()
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            for name in names:
                begin, end = header[name]["data_offsets"]
                self._places[name] = _DTYPES[header[name]["dtype"]], 8 + size + begin, end - begin
        except (safetensors.SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{path} is not a whole file of packed weights ({error}): delete it") from error

    def __contains__(self, name: str) -> bool:
        """Whether the file has what was packed under this name."""
        return name in self._places

    def read(self, name: str) -> Tensor:
        """Read by all threads at once, straight into memory of huge pages. Raises OSError, and EOFError at the end."""
        dtype, begin, size = self._places[name]
        raw = memory.empty(size)
        target = memoryview(raw.numpy())
        threads = torch.get_num_threads()
        bounds = [size * i // threads for i in range(threads + 1)]
        with self.path.open("rb") as stream, concurrent.futures.ThreadPoolExecutor(threads) as pool:
            parts = [pool.submit(_fill, stream.fileno(), target[a:b], begin + a) for a, b in itertools.pairwise(bounds)]
            for part in parts:
                part.result()
        return raw.view(dtype)


def _fill(file: int, target: memoryview, begin: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], begin + done)
        if not count:
            raise EOFError("a file of packed weights ends too soon")
        done += count


def write(path: Path, packed: Mapping[str, Tensor]) -> None:
    """Write packed weights, whole or not at all."""
    with whole_file(path) as file:
        write_safetensors(file, packed)
