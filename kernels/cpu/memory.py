"""Large memory in huge pages, where the system has them: of small ones, finding a page takes time at each of them."""

import mmap

import torch
from torch import Tensor

_HUGE = 2 << 20


def empty(bytes_: int) -> Tensor:
    """An uninitialised uint8 tensor, aligned to a cache line; from 4 MiB on aligned to a huge page and advised so."""
    if bytes_ < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(bytes_, dtype=torch.uint8)
    block = mmap.mmap(-1, bytes_ + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    begin = -whole.data_ptr() % _HUGE
    return whole[begin : begin + bytes_]
