"""Dynamic batching: jobs wait in a queue, batches go to the worker, and samples come back to their jobs."""

import asyncio
import itertools
import math

import numpy as np

from .batches import Batch, Job, Piece, Plan, Queue
from .errors import ApiError
from .metrics import Metrics
from .settings import Limits
from .worker import Worker, WorkerError

#: Batches that the worker has at a time: while it evaluates one, the next one is there already.
_IN_FLIGHT = 2


class Batcher:
    """Gives jobs to a worker, in an event loop.

    A worker that dies takes with it the jobs that it had samples of; those that wait are for the next worker.
    """

    def __init__(self, worker: Worker, limits: Limits, metrics: Metrics) -> None:
        self._worker, self._limits, self._metrics = worker, limits, metrics
        self._queue = Queue(limits.sizes, limits.wait)
        self._numbers = itertools.count()
        self._answers: dict[int, tuple[Job, asyncio.Future[np.ndarray], list[tuple[Piece, np.ndarray]]]] = {}
        self._in_flight: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._rate = 0.0  # samples a second, of late
        self._closed = False
        worker.on_change = self._send
        metrics.watch(lambda: self._queue.samples, lambda: worker.ready, lambda: worker.restarts)

    def submit(
        self, plan: Plan, count: int, seed: int, first_sample: int, labels: tuple[int, ...] | None, pixels: bool
    ) -> "asyncio.Future[np.ndarray]":
        """Let samples be drawn: [count, C, *spatial], uint8 where pixels are wanted, else float32.

        Where the future is cancelled, those that are in no batch yet are not drawn.

        Raises:
            ApiError: the queue is full, or the service ends; the future has one where the worker dies.
        """
        if self._closed:
            raise ApiError(503, "the service is shutting down", "shutting_down", retry=1)
        if self._queue.samples + count > self._limits.queue:
            retry = math.ceil(self._queue.samples / self._rate) if self._rate else 1
            message = f"{self._queue.samples} samples wait already, of {self._limits.queue} at most: try again later"
            raise ApiError(429, message, "queue_full", retry=min(max(retry, 1), 60))
        now = asyncio.get_running_loop().time()
        job = Job(next(self._numbers), plan, count, seed, first_sample, labels, pixels, now)
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._answers[job.number] = job, future, []
        future.add_done_callback(lambda _: self._forget(job))
        self._queue.add(job)
        self._send()
        return future

    def close(self) -> None:
        """Take no more jobs, and end those that are there."""
        self._closed = True
        for _, future, _ in list(self._answers.values()):
            if not future.done():
                future.set_exception(ApiError(503, "the service was shut down", "shutting_down"))

    def _send(self) -> None:
        """Give the worker the batches that are due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._worker.ready and len(self._in_flight) < _IN_FLIGHT:
            batch = self._queue.take(loop.time())
            if batch is None:
                if (due := self._queue.due()) is not None:
                    self._timer = loop.call_at(due, self._send)
                return
            task = loop.create_task(self._evaluate(batch, self._worker.send(batch)))
            self._in_flight.add(task)
            task.add_done_callback(self._landed)

    def _landed(self, task: "asyncio.Future[None]") -> None:
        self._in_flight.discard(task)
        self._send()

    async def _evaluate(self, batch: Batch, sent: "asyncio.Future[tuple[list[np.ndarray], float]]") -> None:
        self._metrics.batches.observe(batch.samples)
        self._metrics.padding.inc(batch.size - batch.samples)
        try:
            found, seconds = await sent
        except WorkerError as error:
            for piece in batch.pieces:
                self._fail(piece.job, ApiError(500, str(error), "worker_failed"))
            return
        self._metrics.evaluation.observe(seconds)
        self._metrics.samples.inc(batch.samples)
        self._rate = batch.samples / max(seconds, 1e-9)
        for piece, samples in zip(batch.pieces, found, strict=True):
            self._arrive(piece, samples)

    def _arrive(self, piece: Piece, samples: np.ndarray) -> None:
        if piece.job not in self._answers:
            return
        job, future, parts = self._answers[piece.job]
        parts.append((piece, samples))
        if sum(part.count for part, _ in parts) == job.count and not future.done():
            parts.sort(key=lambda part: part[0].first_sample)
            future.set_result(np.concatenate([each for _, each in parts]) if len(parts) > 1 else samples)

    def _fail(self, number: int, error: ApiError) -> None:
        if number not in self._answers:
            return
        job, future, _ = self._answers[number]
        self._queue.discard(job)
        if not future.done():
            future.set_exception(error)

    def _forget(self, job: Job) -> None:
        del self._answers[job.number]
        self._queue.discard(job)
