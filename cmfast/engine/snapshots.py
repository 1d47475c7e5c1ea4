"""What a network was, where cmfast._cpu was not built: as csrc/cpu_snapshots.h has it, in Python, and slower.

A machine with a GPU has no need of a C++ compiler. There the check of a large network takes milliseconds a call.
"""

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

#: Bytes of a part up to which all of it is read; of a larger one, words and the last bytes are.
SMALL, _WORDS = 256, 8


class Snapshot:
    """Which objects some dicts hold, in which order, and of which class their owners are, whose attributes they are."""

    def __init__(self, dicts: Sequence[dict[str, Any]], owners: Sequence[Any]) -> None:
        self._dicts, self._owners = list(dicts), list(owners)
        self._types = [type(owner) for owner in owners]
        self._before = [(list(d), list(d.values())) for d in dicts]

    def first_difference(self) -> int:
        """The first of the dicts that holds anything else now; -1 where none does."""
        for i, (found, (names, values)) in enumerate(zip(self._dicts, self._before, strict=True)):
            if type(self._owners[i]) is not self._types[i]:
                return i
            same = len(found) == len(names) and all(map(operator.is_, found.values(), values))
            if not same or not all(map(operator.is_, found, names)):
                return i
        return -1

    def accept(self, i: int) -> None:
        """Remember one of the dicts as it is now."""
        self._before[i] = list(self._dicts[i]), list(self._dicts[i].values())


class TensorSnapshot:
    """How often torch has counted writes to tensors, what they are, where their elements are, and a sample of these."""

    def __init__(self, tensors: Sequence[tuple[Tensor, bool, bool]], parts: Sequence[tuple[int, int]]) -> None:
        """Take tensors, each with whether its writes are counted and whether it has elements in memory.

        `parts` are addresses and sizes in bytes of what is sampled.
        """
        self._tensors = list(tensors)
        self._places = [place for part in parts for place in _sample(*part)]
        self._before = self._now()

    def same(self) -> bool:
        """Whether all is as it was."""
        # The elements are looked at last: where their addresses are others, the old ones may not be read any more.
        return self._now(self._before[0]) == self._before

    def _now(self, before: Any = None) -> tuple[Any, bytes]:
        seen = [
            (t._version if counted else None, (t.dtype, t.data_ptr(), t.shape, t.stride()) if placed else None)
            for t, counted, placed in self._tensors
        ]
        read = before is None or before == seen
        return seen, b"".join(ctypes.string_at(*place) for place in self._places) if read else b""


def look(dicts: Snapshot, tensors: TensorSnapshot, threads: int) -> tuple[int, bool]:
    """The first of the dicts that holds anything else now, or -1, and whether the tensors are the same."""
    return dicts.first_difference(), tensors.same()


def _sample(address: int, size: int) -> list[tuple[int, int]]:
    """Addresses and sizes of what is read of a part of memory."""
    if size <= SMALL:
        return [(address, size)]
    stretch = size // _WORDS
    # Not at the same place of each stretch, so that they lie neither in a row nor in a column of a matrix.
    return [(address + i * stretch + 37 * i % (stretch - 8), 8) for i in range(_WORDS)] + [(address + size - 8, 8)]
