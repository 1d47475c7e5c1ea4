"""The batcher with a worker that is played: what it is given, and what becomes of the answers."""

import asyncio
import dataclasses

import numpy as np
import pytest

from cmfast.serving.batches import Plan
from cmfast.serving.batching import Batcher
from cmfast.serving.errors import ApiError
from cmfast.serving.metrics import Metrics
from cmfast.serving.settings import Limits
from cmfast.serving.worker import WorkerError

ONE, TWO = Plan("multistep", (80.0,)), Plan("multistep", (80.0, 0.5))
LIMITS = Limits(batch=4, wait=0.0, count=16, queue=20)


class Played:
    """A worker that evaluates when it is told to: a sample is its seed and its index."""

    def __init__(self):
        self.on_change = lambda: None
        self.ready, self.restarts = True, 0
        self.given = []

    def send(self, batch):
        assert self.ready
        future = asyncio.get_running_loop().create_future()
        self.given.append((batch, future))
        return future

    async def evaluate(self, which=0):
        batch, future = self.given.pop(which)
        found = [np.array([[p.seed, p.first_sample + i] for i in range(p.count)]) for p in batch.pieces]
        future.set_result((found, 0.1))
        await settle()

    async def die(self):
        self.ready = False
        for _, future in self.given:
            future.set_exception(WorkerError("the worker was killed"))
        self.given.clear()
        await settle()

    async def begin_again(self):
        self.ready = True
        self.on_change()
        await settle()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def asked(batcher, count, seed, plan=ONE):
    return batcher.submit(plan, count, seed, 10, None, True)


def expected(count, seed):
    return [[seed, 10 + i] for i in range(count)]


def played(test):
    """A test of a batcher and its worker, in an event loop."""

    def run():
        async def within():
            worker = Played()
            await test(Batcher(worker, LIMITS, Metrics(LIMITS.sizes)), worker)

        asyncio.run(within())

    run.__name__ = test.__name__
    return run


def sizes(worker):
    return [(batch.size, [(p.seed, p.count) for p in batch.pieces]) for batch, _ in worker.given]


@played
async def test_while_two_batches_are_with_the_worker_requests_join(batcher, worker):
    futures = {seed: asked(batcher, 1, seed) for seed in range(6)}
    await settle()
    assert sizes(worker) == [(1, [(0, 1)]), (1, [(1, 1)])]
    await worker.evaluate()
    assert sizes(worker)[1:] == [(4, [(2, 1), (3, 1), (4, 1), (5, 1)])]
    await worker.evaluate()
    await worker.evaluate()
    assert worker.given == []
    for seed, future in futures.items():
        assert future.result().tolist() == expected(1, seed)


@played
async def test_a_large_request_comes_back_whole_and_does_not_hold_up_small_ones(batcher, worker):
    large = asked(batcher, 14, 1)
    small = asked(batcher, 1, 2)
    await settle()
    assert sizes(worker) == [(4, [(1, 4)]), (4, [(1, 4)])]
    await worker.evaluate(1)  # in whatever order
    assert sizes(worker)[1] == (4, [(1, 3), (2, 1)])
    await worker.evaluate(1)
    assert small.result().tolist() == expected(1, 2)
    while worker.given:
        await worker.evaluate(len(worker.given) - 1)
    assert large.result().tolist() == expected(14, 1)


@played
async def test_the_queue_is_limited_and_says_when_to_come_again(batcher, worker):
    accepted = [asked(batcher, 4, 0), asked(batcher, 4, 1), asked(batcher, 16, 2), asked(batcher, 4, 3)]
    with pytest.raises(ApiError, match="20 samples wait already, of 20 at most") as refused:
        asked(batcher, 1, 4)
    assert (refused.value.status, refused.value.code, refused.value.retry) == (429, "queue_full", 1)
    await settle()
    await worker.evaluate()  # of 4 samples in 0.1 s; 16 wait
    asked(batcher, 4, 5)
    with pytest.raises(ApiError) as refused:
        asked(batcher, 1, 4)
    assert refused.value.headers() == {"Retry-After": "1"}
    while worker.given:
        await worker.evaluate()
    assert all(future.done() for future in accepted)
    assert batcher._answers == {}


@played
async def test_what_nobody_waits_for_is_not_evaluated(batcher, worker):
    first, second = asked(batcher, 4, 0), asked(batcher, 4, 1)
    gone, stays = asked(batcher, 12, 2), asked(batcher, 1, 3)
    await settle()
    gone.cancel()
    first.cancel()
    await settle()
    await worker.evaluate()
    await worker.evaluate()
    assert second.result().tolist() == expected(4, 1)
    assert sizes(worker) == [(1, [(3, 1)])]
    await worker.evaluate()
    assert stays.done()


@played
async def test_a_worker_that_dies_takes_its_batches_and_no_more(batcher, worker):
    lost, begun, waits = asked(batcher, 4, 0), asked(batcher, 9, 1), asked(batcher, 2, 2, TWO)
    await settle()
    await worker.die()
    for future in (lost, begun):
        error = future.exception()
        assert (error.status, error.code) == (500, "worker_failed")
        assert error.message == "the worker was killed"
    assert not waits.done()
    later = asked(batcher, 1, 3)
    await settle()
    assert worker.given == []
    await worker.begin_again()
    assert sizes(worker) == [(2, [(2, 2)]), (1, [(3, 1)])]  # nothing of what was begun
    await worker.evaluate()
    await worker.evaluate()
    assert waits.result().tolist() == expected(2, 2)
    assert later.result().tolist() == expected(1, 3)


@played
async def test_a_closed_one_ends_what_is_there_and_takes_no_more(batcher, worker):
    futures = [asked(batcher, 4, seed) for seed in range(4)]
    await settle()
    batcher.close()
    await settle()
    assert [future.exception().status for future in futures] == [503] * 4
    with pytest.raises(ApiError, match="shutting down") as refused:
        asked(batcher, 1, 0)
    assert refused.value.status == 503
    await worker.evaluate()
    assert sizes(worker) == [(4, [(1, 4)])]


def test_the_wait_for_others():
    async def within():
        worker, limits = Played(), dataclasses.replace(LIMITS, wait=0.05)
        batcher = Batcher(worker, limits, Metrics(limits.sizes))
        asked(batcher, 1, 0)
        await asyncio.sleep(0)
        asked(batcher, 1, 1)
        await settle()
        assert worker.given == []
        while not worker.given:
            await asyncio.sleep(0.01)
        assert sizes(worker) == [(2, [(0, 1), (1, 1)])]
        asked(batcher, 4, 2)  # a full one does not wait
        await settle()
        assert len(worker.given) == 2

    asyncio.run(asyncio.wait_for(within(), 30))
