"""NVTX ranges on a GPU, by which Nsight names what it shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .layers import Nesting


@contextmanager
def ranges(device: torch.device) -> Iterator["Ranges"]:
    """Within the block, operators of a GPU can be named; at its end all ranges are closed."""
    found = Ranges(device.type == "cuda")
    try:
        yield found
    finally:
        found.close()


class Ranges:
    """The range of each operator, within those of its module and of the modules that this is a part of."""

    def __init__(self, on: bool) -> None:
        """Name operators, where `on` says so."""
        self._nesting = Nesting(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop) if on else None

    @contextmanager
    def operator(self, layer: str, name: str) -> Iterator[None]:
        """Within the block, an operator is launched."""
        if self._nesting is None:
            yield
            return
        self._nesting.enter(layer)
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    def close(self) -> None:
        """Close the ranges of modules."""
        if self._nesting is not None:
            self._nesting.enter("")
