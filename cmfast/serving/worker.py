"""The service's side of the worker: it is started, given batches, and started again when it dies."""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from .batches import Batch
from .description import Description
from .settings import ModelSettings
from .worker_process import work

logger = logging.getLogger("cmfast.serving")

_LONGEST_PAUSE = 30.0  # seconds between two attempts to start
_ENDING = 2.0  # seconds that a worker has to end when it is told to


class WorkerError(Exception):
    """A batch was not evaluated; the message says why."""


class Worker:
    """A process with the model, in an event loop. All methods and callbacks run there.

    A process that dies takes the batches with it that it was given. It is started again at once; one that dies before
    it is ready, after a pause that doubles each time.

    Attributes:
        on_change: called when `ready` has changed.
        ready: whether batches can be sent.
        restarts: how many times it was started again.
    """

    def __init__(self, settings: ModelSettings, sizes: Sequence[int]) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.ready = False
        self.restarts = 0
        self._settings, self._sizes = settings, tuple(sizes)
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._pending: dict[int, asyncio.Future[tuple[list[np.ndarray], float]]] = {}
        self._batches = 0
        self._keeper: asyncio.Task[None] | None = None
        self._starting: asyncio.Future[None] | None = None

    async def start(self) -> Description:
        """Start the process; returns what it says of its model once it is ready.

        Raises:
            ValueError: the model cannot be loaded; the message is the worker's.
            WorkerError: the process died.
        """
        description = await self._begin()
        self._keeper = asyncio.create_task(self._keep())
        return description

    def send(self, batch: Batch) -> "asyncio.Future[tuple[list[np.ndarray], float]]":
        """Have a batch evaluated: the samples of each of its pieces, and the seconds it took; WorkerError otherwise."""
        self._batches += 1
        future = self._pending[self._batches] = asyncio.get_running_loop().create_future()
        assert self._connection is not None
        with contextlib.suppress(OSError):  # it has died, as the reader is about to say
            self._connection.send((self._batches, batch))
        return future

    async def stop(self) -> None:
        """End the process, with what it is doing."""
        if self._keeper is not None:
            self._keeper.cancel()
        self.ready = False
        self._fail("the service has ended")
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if self._connection is not None and self._process is not None and self._process.pid is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            await asyncio.to_thread(_end, self._process)

    async def _begin(self) -> Description:
        """Start a process and wait until it is ready."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self._settings, self._sizes), name="worker", daemon=True)
        self._process, self._connection, self._messages = process, ours, asyncio.Queue()
        self._starting = asyncio.ensure_future(asyncio.to_thread(_start, process))
        try:
            await asyncio.shield(self._starting)
        except OSError:
            ours.close()
            raise
        finally:
            self._starting.add_done_callback(lambda _: theirs.close())
        arguments = (ours, asyncio.get_running_loop(), self._messages)
        threading.Thread(target=_read, args=arguments, name="worker's messages", daemon=True).start()
        message = await self._messages.get()
        if isinstance(message, str):
            await self._how_it_ended()
            raise ValueError(message)
        if message is None:
            raise WorkerError(f"the worker {await self._how_it_ended()} before it was ready")
        assert isinstance(message, Description)
        self.ready = True
        return message

    async def _keep(self) -> None:
        """Hand out results; when the process dies, start another one."""
        while True:
            while (message := await self._messages.get()) is not None:
                number, found, seconds = message
                future = self._pending.pop(number)
                if future.done():
                    continue
                if isinstance(found, str):
                    future.set_exception(WorkerError(f"the evaluation failed: {found}"))
                else:
                    future.set_result((found, seconds))
            self.ready = False
            how = await self._how_it_ended()
            logger.error("the worker %s; another one is started", how)
            self._fail(f"the worker {how} while it evaluated this request")
            self.on_change()
            await self._begin_again()
            self.on_change()

    async def _begin_again(self) -> None:
        pause = 1.0
        while not self.ready:
            self.restarts += 1
            try:
                await self._begin()
            except (ValueError, WorkerError, OSError) as error:
                logger.error("no worker: %s; the next attempt is in %.0f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _fail(self, reason: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(WorkerError(reason))
        self._pending.clear()

    async def _how_it_ended(self) -> str:
        assert self._process is not None
        assert self._connection is not None
        self._connection.close()
        await asyncio.to_thread(_end, self._process)
        status = self._process.exitcode
        return f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"


def _read(connection: Connection, loop: asyncio.AbstractEventLoop, messages: "asyncio.Queue[Any]") -> None:
    """Put what a worker sends into a queue, and None when it sends no more. Runs in a thread of its own."""
    while True:
        try:
            message = connection.recv()
        except Exception:  # its end; or a message for which there is no memory, whose rest nobody could make sense of
            message = None
        try:
            loop.call_soon_threadsafe(messages.put_nowait, message)
        except RuntimeError:  # the loop has ended
            return
        if message is None:
            return


def _start(process: SpawnProcess) -> None:
    """Start a process that SIGINT and SIGTERM do not reach.

    They are the service's to handle: where a terminal or an init system sends them to all processes, this one still
    has batches to evaluate. A process inherits the signals that the thread which starts it has blocked.
    """
    resource_tracker.ensure_running()  # which process.start() would do, and unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: SpawnProcess) -> None:
    """Wait for a process that was told to end; kill it where it does not."""
    process.join(_ENDING)
    if process.is_alive():
        process.kill()
        process.join()
