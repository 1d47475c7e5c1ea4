"""What a worker sends, as a thread of this process."""

import asyncio
import errno
import multiprocessing
import threading

import numpy as np
import pytest

from cmfast.preconditioning import EDM
from cmfast.serving.batches import Batch, Piece, Plan
from cmfast.serving.description import Description
from cmfast.serving.settings import ModelSettings
from cmfast.serving.worker import Worker
from cmfast.serving.worker_process import work

from ..bulk import models

BATCH = Batch(Plan("multistep", (80.0,)), 2, (Piece(0, 1, 0, 2, (3, 4), False),))


@pytest.fixture
def begun():
    """Begin a worker; gives its connection, which is to be ended."""
    threads = []

    def begin(load, **settings):
        ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, ModelSettings(load, "a model", threads=1, **settings), (1, 2))
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[0].start()
        return ours

    yield begin
    threads[0].join(60)
    assert not threads[0].is_alive()


def test_batch_after_batch_until_it_is_told_to_end(begun):
    connection = begun(models.model)
    about = connection.recv()
    assert isinstance(about, Description)
    assert (about.name, about.sample_shape, about.num_classes) == ("a model", (1, 8, 8), 10)
    assert (about.accelerated, about.device, about.size) == (False, "cpu", "8x8")
    for number in (7, 8):
        connection.send((number, BATCH))
        answer, (samples,), seconds = connection.recv()
        assert answer == number
        assert seconds > 0
        expected = models.model().sample(2, seed=1, class_labels=[3, 4])
        np.testing.assert_array_equal(samples, expected.numpy())
    connection.send(None)


def test_a_batch_that_fails_is_told_and_the_next_one_works(begun):
    connection = begun(models.model, backend="reference")
    assert isinstance(connection.recv(), Description)
    connection.send((1, Batch(BATCH.plan, 2, (Piece(0, 1, 0, 2, (3, 44), False), Piece(0, -1, 0, 1, (3,), False)))))
    number, told, _ = connection.recv()
    assert number == 1
    assert "seed" in told
    assert "\n" not in told
    connection.send((2, BATCH))
    assert connection.recv()[0] == 2
    connection.close()  # the service has ended


def test_a_model_that_cannot_be_loaded(begun):
    def load():
        raise FileNotFoundError(2, "No such file or directory", "a.pt")

    assert begun(load).recv() == "a.pt: No such file or directory"


def test_a_backend_that_there_is_not(begun):
    assert "no_such" in begun(models.model, backend="no_such").recv()


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch):
    """As where there is no memory for another process, for a moment."""
    started, about = [], Description("a model", (1, 8, 8), 10, EDM(), {}, False, "cpu")

    def start(process):
        started.append(process)
        if len(started) == 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def read(connection, loop, messages):
        loop.call_soon_threadsafe(messages.put_nowait, about)

    async def work():
        worker = Worker(ModelSettings(models.model, "a model", threads=1), (1, 2))
        await worker._begin_again()
        assert worker.ready
        assert worker.restarts == 2
        await worker.stop()  # of a process that never was

    monkeypatch.setattr("cmfast.serving.worker._start", start)
    monkeypatch.setattr("cmfast.serving.worker._read", read)
    asyncio.run(asyncio.wait_for(work(), 30))
    assert len(started) == 2
