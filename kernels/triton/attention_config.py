"""Sizes of the attention kernels' tiles: a table, and a search on the GPU at hand for those who ask for it.

The table starts from tiles of 64 x 64 and 4 warps, since these networks have few of them (6 heads of 1024 positions
make 96), and goes down to what an architecture compiles without spilling. CMFAST_AUTOTUNE=1 times the table's tiles at
the first call of each shape on a GPU, and keeps the fastest in memory and in a file in the folder CMFAST_CACHE (without
it, in Triton's cache).
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton
from torch import Tensor

from .launch import Launch

#: The file of measured tiles.
FILE_NAME = "cmfast-attention.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """How one attention kernel is launched.

    Attributes:
        block_t: queries of a tile.
        block_s: keys of a tile.
        num_warps: warps of a program.
        num_stages: depth of software pipelining over the tiles of the loop.
    """

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int


# Kernel, start of the architecture's name, bytes of an element, head sizes up to, T from: the first row that fits.
_TABLE: tuple[tuple[str, str, int, int, int, Config], ...] = (
    ("forward", "gfx", 2, 128, 0, Config(64, 64, 4, 2)),
    ("forward", "", 2, 64, 2048, Config(128, 64, 8, 3)),
    ("forward", "", 2, 64, 0, Config(64, 64, 4, 3)),
    ("forward", "sm_9", 2, 128, 0, Config(64, 64, 4, 2)),
    ("forward", "sm_10", 2, 128, 0, Config(64, 64, 4, 2)),
    ("forward", "", 2, 128, 0, Config(64, 64, 8, 2)),
    ("forward", "", 4, 64, 0, Config(32, 32, 4, 2)),
    ("forward", "sm_8", 4, 128, 0, Config(32, 32, 4, 2)),
    ("forward", "gfx", 4, 128, 0, Config(32, 32, 4, 2)),
    ("forward", "", 4, 128, 0, Config(16, 16, 4, 1)),
    ("dq", "", 2, 64, 0, Config(64, 64, 4, 2)),
    ("dq", "gfx", 2, 128, 0, Config(64, 32, 4, 2)),
    ("dq", "sm_9", 2, 128, 0, Config(64, 64, 4, 2)),
    ("dq", "sm_10", 2, 128, 0, Config(64, 64, 4, 2)),
    ("dq", "", 2, 128, 0, Config(64, 64, 8, 2)),
    ("dq", "", 4, 64, 0, Config(32, 32, 8, 2)),
    ("dq", "gfx", 4, 128, 0, Config(32, 32, 4, 2)),
    ("dq", "", 4, 128, 0, Config(16, 32, 4, 2)),
    ("dkdv", "gfx", 2, 64, 0, Config(64, 64, 4, 2)),
    ("dkdv", "gfx", 2, 128, 0, Config(32, 32, 4, 2)),
    ("dkdv", "sm_9", 2, 64, 0, Config(64, 64, 4, 2)),
    ("dkdv", "sm_9", 2, 128, 0, Config(32, 64, 4, 2)),
    ("dkdv", "sm_10", 2, 128, 0, Config(64, 64, 4, 2)),
    ("dkdv", "", 2, 64, 0, Config(32, 64, 4, 2)),
    ("dkdv", "", 2, 128, 0, Config(64, 64, 8, 2)),
    ("dkdv", "gfx", 4, 64, 0, Config(32, 32, 4, 2)),
    ("dkdv", "gfx", 4, 128, 0, Config(16, 32, 4, 2)),
    ("dkdv", "", 4, 128, 0, Config(32, 32, 8, 2)),
)

# The same for tensors without 16-byte vectors: there each element of a tile needs registers for an address of its own.
_TABLE_WITHOUT_VECTORS: tuple[tuple[str, str, int, int, int, Config], ...] = (
    ("dkdv", "gfx", 2, 128, 0, Config(32, 32, 4, 2)),
    ("dkdv", "gfx", 4, 128, 0, Config(32, 32, 4, 2)),
    ("forward", "", 2, 128, 0, Config(64, 32, 8, 2)),
    ("dq", "", 2, 64, 0, Config(64, 32, 8, 2)),
    ("dq", "", 2, 128, 0, Config(32, 32, 8, 2)),
    ("dkdv", "", 2, 128, 0, Config(32, 64, 8, 2)),
    ("forward", "", 4, 128, 0, Config(32, 32, 4, 2)),
    ("dq", "", 4, 128, 0, Config(16, 32, 4, 2)),
    ("dkdv", "", 4, 128, 0, Config(32, 32, 8, 2)),
)


def configuration(kernel: str, q: Tensor, arch: str, unit: int) -> Config:
    """The tiles of a kernel, by the table.

    Args:
        kernel: "forward", "dq" or "dkdv".
        q: the queries [N, H, T, D]: their T, D and dtype count.
        arch: the architecture, "sm_90" or "gfx942" say; "" takes the rows for any.
        unit: how many elements a vector may have.
    """
    itemsize, queries, head_dim = q.element_size(), q.shape[2], q.shape[3]
    for name, prefix, bytes_, largest, least, config in _TABLE if unit * itemsize >= 16 else _TABLE_WITHOUT_VECTORS:
        fits = (name, bytes_) == (kernel, itemsize) and arch.startswith(prefix)
        if fits and head_dim <= largest and queries >= least:
            return config
    raise ValueError(f"attention: no tiles for {kernel} at head size {head_dim} in {q.dtype} on {arch or 'any'}")


def tuned(kernel: str, q: Tensor, k: Tensor, plan: Callable[[Config], Launch]) -> Config | None:
    """The fastest tiles for a kernel at these shapes, measured once; None unless on a GPU and CMFAST_AUTOTUNE=1.

    Args:
        kernel: "forward", "dq" or "dkdv".
        q: the queries [N, H, T, D].
        k: the keys [N, H, S, D].
        plan: the kernel's launch with given tiles.
    """
    if os.environ.get("CMFAST_AUTOTUNE") != "1" or not _can_measure(q):
        return None
    shapes = f"q {list(q.shape)} {q.stride()}, k {list(k.shape)} {k.stride()}"
    key = f"{kernel}, {_device_name(q.device)}, {q.dtype}, {shapes}, triton {triton.__version__}"
    folder = Path(os.environ.get("CMFAST_CACHE") or triton.knobs.cache.dir)
    known = _load(folder)
    if key not in known:
        rows = (*_TABLE, *_TABLE_WITHOUT_VECTORS)
        candidates = dict.fromkeys(row[-1] for row in rows if (row[0], row[2]) == (kernel, q.element_size()))
        known[key] = min(candidates, key=lambda config: _milliseconds(plan(config)))
        _save(folder, known)
    return known[key]


def _can_measure(q: Tensor) -> bool:
    # Timing waits for the device, which a graph that is being captured does not allow.
    on_gpu = q.device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and q.numel() > 0 and not torch.cuda.is_current_stream_capturing()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _milliseconds(launch: Launch) -> float:
    try:
        return triton.testing.do_bench(launch.run, return_mode="median")
    except triton.runtime.errors.OutOfResources:  # more shared memory than this device has
        return float("inf")


@functools.cache
def _load(folder: Path) -> dict[str, Config]:
    try:
        rows = json.loads((folder / FILE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return {key: Config(**row) for key, row in rows.items()}


def _save(folder: Path, known: Mapping[str, Config]) -> None:
    # Written aside and renamed, so that no other process reads half a file. Where nothing can be written, nothing is.
    text = json.dumps({key: dataclasses.asdict(config) for key, config in known.items()}, indent=1)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(text)
        os.replace(file.name, folder / FILE_NAME)
