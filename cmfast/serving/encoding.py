"""Samples as what clients get: PNGs in JSON, a grid, arrays. Encoded by threads, beside the event loop."""

import asyncio
import base64
import functools
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from ..pictures import encode_png, grid
from .metrics import Metrics

Result = TypeVar("Result")

#: Pictures of fewer values are compressed by one thread, one after the other.
_SMALL = 1 << 14


class Encoder:
    """A few threads that encode."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "encoder")

    async def images(self, pixels: np.ndarray, about: Mapping[str, Any]) -> bytes:
        """The JSON of the images endpoint: each picture [C, H, W] of `pixels` as PNG in base64, and what else is told.

        Large pictures are compressed side by side.
        """
        if pixels[0].size < _SMALL:
            return await self._timed(self._in_thread(lambda: _json([_png(image) for image in pixels], about)))

        async def side_by_side() -> bytes:
            pictures = await asyncio.gather(*(self._in_thread(functools.partial(_png, image)) for image in pixels))
            return await self._in_thread(lambda: _json(pictures, about))

        return await self._timed(side_by_side())

    async def picture(self, pixels: np.ndarray, columns: int | None) -> bytes:
        """The PNG of a grid of samples [N, C, *spatial], uint8."""
        return await self._timed(self._in_thread(lambda: encode_png(grid(torch.from_numpy(pixels), columns))))

    async def arrays(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The bytes of an .npz file."""
        return await self._timed(self._in_thread(lambda: _npz(arrays)))

    def _in_thread(self, function: Callable[[], Result]) -> "asyncio.Future[Result]":
        return asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def _timed(self, work: Any) -> bytes:
        begin = time.perf_counter()
        found: bytes = await work
        self._metrics.encoding.observe(time.perf_counter() - begin)
        return found


def _png(image: np.ndarray) -> str:
    """A picture [1 or 3, H, W] as PNG in base64."""
    return base64.b64encode(encode_png(image[0] if len(image) == 1 else image.transpose(1, 2, 0))).decode()


def _json(pictures: Sequence[str], about: Mapping[str, Any]) -> bytes:
    return json.dumps({**about, "data": [{"b64_json": picture} for picture in pictures]}).encode()


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()
