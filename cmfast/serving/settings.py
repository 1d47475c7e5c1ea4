"""What a service is told when it starts."""

import dataclasses
from collections.abc import Callable

from ..model import ConsistencyModel

#: The engine keeps the programs of eight sizes of a batch (engine/accelerator.py).
_MOST_SIZES = 7


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """How the worker gets its model.

    Attributes:
        load: returns the model; it is pickled, so it must be a function of a module, or a `functools.partial` of one.
        name: of the model, as clients see it.
        backend: of the operators, as `cmfast.kernels.use_backend` takes it; "auto" chooses.
        threads: of the processor; None means torch's choice.
    """

    load: Callable[[], ConsistencyModel]
    name: str
    backend: str = "auto"
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a service takes on.

    Attributes:
        batch: the most samples of one evaluation.
        wait: seconds that a sample waits for others to share its evaluation.
        count: the most samples of one request.
        queue: the most samples that wait; a request of more is refused.
        steps: the most steps, or levels, of a request.
        body: bytes of a request's body.
        receive: seconds in which a request's header, and then its body, must arrive, and a response must move on.
        connections: that are open at the same time.
        grace: seconds that accepted requests have to end when the service is told to stop.

    Raises:
        ValueError: a limit is out of range.
    """

    batch: int = 64
    wait: float = 0.005
    count: int = 64
    queue: int = 1024
    steps: int = 100
    body: int = 1 << 16
    receive: float = 10.0
    connections: int = 512
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("batch", "count", "queue", "steps", "body", "connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"the limit {name} must be at least 1, got {getattr(self, name)}")
        for name in ("wait", "receive", "grace"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"the limit {name} must be seconds from 0 on, got {getattr(self, name)}")
        if self.queue < self.count:
            raise ValueError(f"a request of {self.count} samples would never fit into a queue of {self.queue}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that batches are filled up to, from the smallest on: the largest one, halved again and again."""
        found = [self.batch]
        while found[-1] > 1 and len(found) < _MOST_SIZES:
            found.append(-(-found[-1] // 2))
        return tuple(reversed(found))
