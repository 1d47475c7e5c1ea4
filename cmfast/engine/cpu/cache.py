"""Packed weights in a folder: a file for each network and dtype of products, named by a checksum of the weights."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ...files import whole_file
from ...kernels import native
from ...kernels.cpu import memory
from ...kernels.cpu.conv import packing

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LINE = 64  # bytes of a cache line


def fingerprint(tensors: Mapping[str, Tensor], packed: Iterable[str], products: torch.dtype) -> str:
    """A name for what is packed of these tensors: their names, shapes and contents, and what was computed of them.

    `packed` are the names of the weights that are packed, each an expression of the tensors. The version of cmfast and
    the name of the packing, which an instruction set may have of its own, are in it too.
    """
    names = hashlib.sha256(f"{metadata.version('cmfast')} {packing()} {products} {list(packed)}".encode())
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise RuntimeError(
                f"the network has changed, and its {name} was given up (keep_weights=False): accelerate it anew"
            )
        tensor = tensor.detach().contiguous()
        sum_ = native.cpu().checksum(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
        names.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {sum_}".encode())
    return names.hexdigest()[:32]


class Stored:
    """The packed weights in a file that `write` wrote, which is mapped: what takes its place later is another file.

    Attributes:
        path: of the file; where there is none, there are no weights.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is not one of packed weights, or not whole."""
        self.path = path
        self._mapped: Tensor | None = None
        self._places: dict[str, tuple[torch.dtype, int, int]] = {}
        if not path.exists():
            return
        try:
            while not self._map():  # another process has put a new file in its place meanwhile
                pass
        except (safetensors.SafetensorError, OSError, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a whole file of packed weights ({error}): delete it") from error

    def _map(self) -> bool:
        """Map the file and read from its header what is where; False where both are not of the same file."""
        with safetensors.safe_open(self.path, "pt") as file:  # checks that the file is whole
            names = file.keys()
        with self.path.open("rb") as stream:
            length = stream.read(8)
            size = int.from_bytes(length, "little")
            content = stream.read(size)
        header = json.loads(content)
        self._places = {}
        for name in names:
            begin, end = header[name]["data_offsets"]
            self._places[name] = _DTYPES[header[name]["dtype"]], 8 + size + begin, end - begin
        end = max((begin + size for _, begin, size in self._places.values()), default=8 + size)
        self._mapped = memory.mapped(self.path, end)
        return bytes(self._mapped[: 8 + size].numpy()) == length + content

    def __contains__(self, name: str) -> bool:
        """Whether the file has what was packed under this name."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """The names in the file."""
        return iter(self._places)

    def read(self, name: str) -> Tensor:
        """What the file has under this name, in memory that is not to be written to."""
        dtype, begin, size = self._places[name]
        assert self._mapped is not None
        tensor = self._mapped[begin : begin + size]
        return (tensor if begin % _LINE == 0 else tensor.clone()).view(dtype)


def write(path: Path, packed: Mapping[str, Tensor]) -> None:
    """Write packed weights, whole or not at all: a safetensors file in which each begins a cache line, where it can."""
    # Those that end within a line are the last.
    tensors = dict(sorted(packed.items(), key=lambda item: item[1].nbytes % _LINE > 0))
    ends = [0, *itertools.accumulate(t.nbytes for t in tensors.values())]
    entries = {
        name: {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": place}
        for (name, t), place in zip(tensors.items(), itertools.pairwise(ends), strict=True)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % _LINE)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().flatten().view(torch.uint8).numpy().data)
