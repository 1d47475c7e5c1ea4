"""PNG of many small images: about twenty times faster than an image library is for 8 × 8 pixels.

The format is the W3C's Portable Network Graphics specification (third edition, 2025): a signature and chunks, each with
its length, type and CRC; the pixels' rows, each after the number of its filter, are one zlib stream.
"""

import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2  # colour types
_NONE, _SUB, _UP, _PAETH = 0, 1, 2, 4  # filters, by their numbers in the file
_LEVEL = 6  # of zlib's compression
_TOGETHER = 64  # images whose filters are chosen at once
#: Images of fewer pixels compress as well without filters.
_SMALL = 256


def encode(images: np.ndarray, mapped: Callable[..., Iterable[Any]] = map) -> list[bytes]:
    """The PNG files of images; they depend on the pixels alone (and on the zlib library).

    Args:
        images: uint8 [N, C, H, W], C 1 (grey) or 3 (red, green, blue).
        mapped: `map`, or the map of a pool of threads: compression leaves the others to run.

    Returns:
        N files.
    """
    _, channels, height, width = images.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY if channels == 1 else _RGB, 0, 0, 0)
    begin, end = _SIGNATURE + _chunk(b"IHDR", header), _chunk(b"IEND", b"")
    files: list[bytes] = []
    for start in range(0, len(images), _TOGETHER):
        some = images[start : start + _TOGETHER]
        rows = np.ascontiguousarray(some.transpose(0, 2, 3, 1)).reshape(len(some), height, width * channels)
        rows = _filtered(rows, channels) if height * width >= _SMALL else _with_filter(rows, _NONE)
        files += [begin + _chunk(b"IDAT", data) + end for data in mapped(_compress, rows)]
    return files


def _compress(rows: np.ndarray) -> bytes:
    return zlib.compress(rows.data, _LEVEL)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _with_filter(rows: np.ndarray, number: int) -> np.ndarray:
    """[N, H, 1 + bytes of a row]: what a filter gives, after its number."""
    out = np.empty((*rows.shape[:2], rows.shape[2] + 1), np.uint8)
    out[..., 0] = number
    out[..., 1:] = rows
    return out


def _filtered(rows: np.ndarray, channels: int) -> np.ndarray:
    """Each row [N, H, bytes] as the difference from a prediction: that of the smallest sum of absolute differences.

    This is the specification's heuristic for choosing a filter (section 12.7).
    """
    left, up, both = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(rows)
    left[..., channels:] = rows[..., :-channels]
    up[:, 1:] = rows[:, :-1]
    both[:, 1:, channels:] = rows[:, :-1, :-channels]
    filters = (_NONE, _SUB, _UP, _PAETH)
    tried = [rows, rows - left, rows - up, rows - _paeth(left, up, both)]
    sums = np.stack([np.abs(t.view(np.int8).astype(np.int16)).sum(-1, dtype=np.int64) for t in tried])
    best = sums.argmin(0)
    out = _with_filter(rows, _NONE)
    for i, number in enumerate(filters[1:], 1):
        chosen = best == i
        out[chosen, 0] = number
        out[chosen, 1:] = tried[i][chosen]
    return out


def _paeth(left: np.ndarray, up: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Of the three neighbours the one nearest to left + up - both; the first of them where several are."""
    a, b, c = (neighbour.astype(np.int16) for neighbour in (left, up, both))
    from_left, from_up, from_both = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = (from_left <= from_up) & (from_left <= from_both)
    return np.where(nearest, left, np.where(from_up <= from_both, up, both))
