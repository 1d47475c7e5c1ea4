"""Where the values of a graph lie: all in one block of memory, those that do not live at the same time in one place."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line


@dataclasses.dataclass(eq=False)
class Buffer:
    """Memory for a value and all views of it.

    Attributes:
        base: a dense tensor without data, as large as what is kept.
        first: number of the step that writes it first; -1 for an input of the graph.
        last: number of the last step that reads it.
        offset: bytes from the beginning of the arena, once it is planned.
    """

    base: Tensor
    first: int
    last: int
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Its size, in whole cache lines."""
        size = self.base.untyped_storage().nbytes()
        return max(LINE, -(-size // LINE) * LINE)


def plan(buffers: Sequence[Buffer], alignment: int = LINE) -> int:
    """Give each buffer its offset, a multiple of `alignment`; the number of bytes of the arena.

    The largest first, each at the lowest offset where no buffer lies that lives at the same time (Pisarchyk and Lee
    2020, "Efficient Memory Management for Deep Neural Net Inference", greedy by size).
    """
    placed: list[Buffer] = []
    total = 0

    def size(buffer: Buffer) -> int:
        return -(-buffer.bytes // alignment) * alignment

    for buffer in sorted(buffers, key=size, reverse=True):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.first <= buffer.last and buffer.first <= other.last:
                if offset + size(buffer) <= other.offset:
                    break
                offset = max(offset, other.offset + size(other))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + size(buffer))
    return total


def view(arena: Tensor, buffer: Buffer, like: Tensor) -> Tensor:
    """The view `like` of a buffer, with the arena's memory."""
    typed = arena[buffer.offset :].view(like.dtype) if like.dtype != arena.dtype else arena[buffer.offset :]
    return torch.as_strided(typed, like.shape, like.stride(), typed.storage_offset() + like.storage_offset())
