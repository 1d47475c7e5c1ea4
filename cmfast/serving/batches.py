"""Which samples of which requests are evaluated together."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

#: Seconds by which a timer may be early.
_EARLY = 1e-4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What samples must have in common to share an evaluation.

    Attributes:
        sampler: a name of `cmfast.sampling.SAMPLERS`.
        levels: at which it evaluates the model.
    """

    sampler: str
    levels: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Samples of one request that lie side by side in a batch.

    Attributes:
        job: number of the job that they are of.
        seed: of their noise.
        first_sample: index of the first one.
        count: how many.
        labels: the class of each; None for an unconditional model.
        pixels: they are wanted as uint8; else as float32.
    """

    job: int
    seed: int
    first_sample: int
    count: int
    labels: tuple[int, ...] | None
    pixels: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """One evaluation.

    Attributes:
        plan: of all its samples.
        size: of the batch as it is evaluated: what the pieces leave of it is filled up, and thrown away.
        pieces: in their order.
    """

    plan: Plan
    size: int
    pieces: tuple[Piece, ...]

    @property
    def samples(self) -> int:
        """Those that were asked for."""
        return sum(piece.count for piece in self.pieces)


@dataclasses.dataclass(eq=False)
class Job:
    """The samples that a request asks for.

    Attributes:
        number: of the job.
        plan: of its samples.
        count: how many.
        seed: of their noise.
        first_sample: index of the first one.
        labels: the class of each; None for an unconditional model.
        pixels: they are wanted as uint8; else as float32.
        arrived: when, in seconds of any clock.
        sent: how many are in a batch already.
    """

    number: int
    plan: Plan
    count: int
    seed: int
    first_sample: int
    labels: tuple[int, ...] | None
    pixels: bool
    arrived: float
    sent: int = 0

    @property
    def left(self) -> int:
        """Samples that are in no batch yet."""
        return self.count - self.sent

    def cut(self, count: int) -> Piece:
        """The next samples, as a piece of a batch."""
        begin, self.sent = self.sent, self.sent + count
        labels = None if self.labels is None else self.labels[begin : self.sent]
        return Piece(self.number, self.seed, self.first_sample + begin, count, labels, self.pixels)


class Queue:
    """Jobs that wait, and the batches that are made of them.

    A batch is made when a full one is there, or its oldest job has waited long enough. Jobs take turns, each with a
    quarter of a batch, so that a large job does not hold up small ones, and small ones are not cut. Plans take turns.

    Attributes:
        samples: how many are in no batch yet.
    """

    def __init__(self, sizes: Sequence[int], wait: float) -> None:
        """Take the sizes of batches, from the smallest on, and the seconds that a job waits for others."""
        self.samples = 0
        self._sizes, self._wait = tuple(sizes), wait
        self._jobs: OrderedDict[Plan, list[Job]] = OrderedDict()  # the plan that was served last is the last one

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self._jobs.setdefault(job.plan, []).append(job)
        self.samples += job.left

    def discard(self, job: Job) -> None:
        """Forget what is left of a job, if anything is."""
        jobs = self._jobs.get(job.plan, [])
        if job in jobs:
            jobs.remove(job)
            self.samples -= job.left
            if not jobs:
                del self._jobs[job.plan]

    def due(self) -> float | None:
        """When the next batch is to be made; None while nothing waits."""
        return min(map(self._due, self._jobs.values()), default=None)

    def take(self, now: float) -> Batch | None:
        """Make the batch that is due, if one is."""
        for plan, jobs in self._jobs.items():
            if self._due(jobs) <= now + _EARLY:
                return self._make(plan, jobs)
        return None

    def _due(self, jobs: list[Job]) -> float:
        """A full batch is due since ever, and so is the rest of a job that was begun."""
        begun = any(job.sent for job in jobs)
        if begun or sum(job.left for job in jobs) >= self._sizes[-1]:
            return float("-inf")
        return min(job.arrived for job in jobs) + self._wait

    def _make(self, plan: Plan, jobs: list[Job]) -> Batch:
        size, count = fitted(sum(job.left for job in jobs), self._sizes)
        cuts = shares([job.left for job in jobs], count, max(1, self._sizes[-1] // 4))
        pieces = tuple(job.cut(share) for job, share in zip(jobs, cuts, strict=True) if share)
        self.samples -= count
        untouched = [job for job, share in zip(jobs, cuts, strict=True) if not share]
        self._jobs[plan] = untouched + [job for job, share in zip(jobs, cuts, strict=True) if share and job.left]
        self._jobs.move_to_end(plan)
        if not self._jobs[plan]:
            del self._jobs[plan]
        return Batch(plan, size, pieces)


def fitted(waiting: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The size of the next batch, and how many of the waiting samples are in it.

    A batch is filled up where it is at least three quarters full; else the next smaller size is taken, and the rest
    waits for the next batch.
    """
    i = next((i for i, size in enumerate(sizes) if size >= waiting), len(sizes) - 1)
    if i and 4 * waiting < 3 * sizes[i]:
        i -= 1
    return sizes[i], min(waiting, sizes[i])


def shares(wanted: Sequence[int], count: int, turn: int) -> list[int]:
    """Divide `count` among those who want so many each: one after the other gets `turn` more, from the first on."""
    found = [0] * len(wanted)
    count = min(count, sum(wanted))
    while count:
        for i, most in enumerate(wanted):
            given = min(turn, most - found[i], count)
            found[i] += given
            count -= given
    return found
