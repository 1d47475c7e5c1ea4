"""A service without its transport: requests in, samples out."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
from starlette.requests import Request

from .batching import Batcher
from .description import Description
from .encoding import Encoder
from .errors import ApiError
from .metrics import Metrics
from .requests import Reader, Wanted
from .settings import Limits
from .worker import Worker


class Service:
    """What the routes share.

    Attributes:
        description: of the model.
        limits: of requests.
        metrics: of this service.
        reader: of requests' bodies.
        encoder: of samples.
        draining: requests that were accepted are ended, new ones refused.
        active: how many requests are being answered.
    """

    def __init__(self, worker: Worker, description: Description, limits: Limits) -> None:
        self.description, self.limits = description, limits
        self.metrics = Metrics(limits.sizes)
        self.reader = Reader(description, limits)
        self.encoder = Encoder(self.metrics)
        self.draining = False
        self.active = 0
        self._worker = worker
        self._batcher = Batcher(worker, limits, self.metrics)

    @property
    def state(self) -> str:
        """Whether requests are taken: "ok", "starting" while there is no worker, or "shutting down"."""
        if self.draining:
            return "shutting down"
        return "ok" if self._worker.ready else "starting"

    async def draw(self, wanted: Wanted, pixels: bool, gone: Callable[[], Awaitable[None]]) -> np.ndarray:
        """The samples that a request wants, uint8 where it wants pixels, else float32.

        Args:
            wanted: by the request.
            pixels: whether it wants them.
            gone: returns when the client has gone; what is left to draw is then not drawn.

        Raises:
            ApiError: they were not drawn.
        """
        future = self._batcher.submit(
            wanted.plan, wanted.count, wanted.seed, wanted.first_sample, wanted.labels, pixels
        )

        async def watch() -> None:
            await gone()
            if not future.done():
                future.set_exception(ApiError(400, "the client has gone", "client_disconnected"))

        watcher = asyncio.create_task(watch())
        try:
            return await future
        finally:
            watcher.cancel()

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Refuse new requests; wait for those that are being answered, so long at most, or until there is a hurry."""
        self.draining = True
        end = asyncio.get_running_loop().time() + seconds
        while self.active and not hurry.is_set() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        self._batcher.close()


async def until_gone(request: Request) -> None:
    """Wait until the client of a request whose body was read has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
