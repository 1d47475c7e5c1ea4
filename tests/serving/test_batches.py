import itertools

import pytest

from cmfast.serving.batches import Job, Plan, Queue, fitted, shares
from cmfast.serving.settings import Limits

ONE, TWO = Plan("multistep", (80.0,)), Plan("multistep", (80.0, 0.5))
SIZES = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("wanted", "count", "turn", "expected"),
    [
        ([64, 1, 1], 16, 4, [14, 1, 1]),
        ([1, 1, 64], 16, 4, [1, 1, 14]),
        ([10, 10, 10], 16, 4, [8, 4, 4]),
        ([10, 10, 10], 16, 1, [6, 5, 5]),
        ([4, 4, 4, 4, 4], 16, 4, [4, 4, 4, 4, 0]),
        ([3, 9], 100, 4, [3, 9]),
        ([5], 3, 4, [3]),
    ],
)
def test_shares(wanted, count, turn, expected):
    assert shares(wanted, count, turn) == expected


def test_batches_are_filled_up_by_a_quarter_at_most():
    assert [fitted(n, SIZES) for n in range(1, 10)] == [
        (1, 1),
        (2, 2),
        (4, 3),
        (4, 4),
        (4, 4),
        (8, 6),
        (8, 7),
        (8, 8),
        (8, 8),
    ]
    assert fitted(3, (4, 8)) == (4, 3)
    assert fitted(1, (4, 8)) == (4, 1)  # nothing is smaller


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(1, (1,)), (6, (1, 2, 3, 6)), (64, (1, 2, 4, 8, 16, 32, 64)), (256, (4, 8, 16, 32, 64, 128, 256))],
)
def test_sizes(batch, sizes):
    assert Limits(batch=batch).sizes == sizes


@pytest.mark.parametrize(
    "limits", [{"batch": 0}, {"wait": -1.0}, {"wait": float("nan")}, {"count": 65, "queue": 64}, {"steps": 0}]
)
def test_limits_that_cannot_be(limits):
    with pytest.raises(ValueError, match=r"got|never fit"):
        Limits(**limits)


numbers = itertools.count()


def job(count, plan=ONE, arrived=0.0, labels=None):
    return Job(next(numbers), plan, count, 7, 100, labels, True, arrived)


def queue(*jobs):
    found = Queue(SIZES, 0.5)
    for each in jobs:
        found.add(each)
    return found


def test_a_batch_is_due_when_it_is_full_or_the_oldest_has_waited():
    waiting = queue(job(2, arrived=10.0))
    assert waiting.due() == 10.5
    assert waiting.take(10.4) is None
    waiting.add(job(1, arrived=10.45))
    assert waiting.due() == 10.5
    batch = waiting.take(10.5)
    assert (batch.size, [piece.count for piece in batch.pieces]) == (4, [2, 1])
    assert (waiting.due(), waiting.samples) == (None, 0)
    assert queue(job(8, arrived=10.0)).take(10.0).size == 8


def test_a_large_job_is_cut_and_its_rest_is_due_at_once():
    large = job(19, labels=tuple(range(19)))
    waiting = queue(large)
    pieces = []
    while batch := waiting.take(0.0):
        (piece,) = batch.pieces
        pieces.append(piece)
        assert batch.samples == piece.count
    assert [piece.count for piece in pieces] == [8, 8, 3]
    assert [piece.first_sample for piece in pieces] == [100, 108, 116]
    assert [label for piece in pieces for label in piece.labels] == list(range(19))
    assert waiting.samples == 0


def test_small_jobs_overtake_a_large_one():
    large = job(64)
    waiting = queue(large)
    waiting.take(0.0)
    small = job(2)
    waiting.add(small)
    batch = waiting.take(0.0)
    assert {piece.job: piece.count for piece in batch.pieces} == {large.number: 6, small.number: 2}
    assert (large.left, small.left, waiting.samples) == (50, 0, 50)


def test_jobs_take_turns():
    """Who had a share goes behind those who had none, however many large ones there are."""
    jobs = [job(20) for _ in range(6)] + [job(1)]
    waiting = queue(*jobs)
    served = [[(jobs.index(each), piece.count) for piece in waiting.take(0.0).pieces for each in jobs
               if each.number == piece.job] for _ in range(3)]  # fmt: skip
    assert served == [
        [(0, 2), (1, 2), (2, 2), (3, 2)],
        [(4, 2), (5, 2), (6, 1), (0, 2), (1, 1)],
        [(2, 2), (3, 2), (4, 2), (5, 2)],
    ]


def test_plans_take_turns_and_do_not_mix():
    first, second = job(24, ONE), job(16, TWO)
    waiting = queue(first, second)
    plans = []
    while batch := waiting.take(0.0):
        plans.append(batch.plan)
        assert batch.size == 8
    assert plans == [ONE, TWO, ONE, TWO, ONE]


def test_what_is_left_of_a_job_can_be_forgotten():
    begun, untouched = job(12), job(3, TWO)
    waiting = queue(begun, untouched)
    waiting.take(0.0)
    assert waiting.samples == 7
    waiting.discard(begun)
    waiting.discard(begun)
    assert (waiting.samples, waiting.due()) == (3, 0.5)
    waiting.discard(untouched)
    assert (waiting.samples, waiting.due()) == (0, None)
