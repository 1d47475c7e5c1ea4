"""Large memory in huge pages, where the system has them: of small ones, finding a page takes time at each of them."""

import mmap
from pathlib import Path

import torch
from torch import Tensor

from .. import native

_HUGE = 2 << 20


def empty(bytes_: int) -> Tensor:
    """An uninitialised uint8 tensor, aligned to a cache line; from 4 MiB on aligned to a huge page and advised so."""
    if bytes_ < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(bytes_, dtype=torch.uint8, device="cpu")
    block = mmap.mmap(-1, bytes_ + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    begin = -whole.data_ptr() % _HUGE
    return whole[begin : begin + bytes_]


def mapped(path: Path, bytes_: int) -> Tensor:
    """The first bytes of a file, as a uint8 tensor that is there at once: the system reads what is looked at.

    Meanwhile a thread reads all of it into huge pages, which take the place of the file's. Nobody may write to the file
    before that is done, nor to the tensor.

    Raises:
        OSError: the file cannot be read.
        EOFError: it is shorter.
    """
    if path.stat().st_size < bytes_:
        raise EOFError(f"{path} ends too soon: it has {path.stat().st_size} bytes, {bytes_} were expected")
    return torch.frombuffer(native.cpu().MappedFile(str(path), bytes_), dtype=torch.uint8)
