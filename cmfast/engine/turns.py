"""Who may use a network's modules: many threads beside one another, or one alone, which captures them.

While a module is captured it has other parameters, and so have all networks that share it: none may run its forward or
look at it then. Plain modules that something else runs meanwhile are not protected.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds that a thread lets one go first that wants to be alone. No longer: that one may wait for a thread beside
#: others, which waits for this one.
_COURTESY = 1.0


class Turns:
    """Turns that threads take. A thread that is beside others and wants to be alone is not counted while it waits.

    Who wants to be alone goes before those that would be beside: else a few that take turns would keep it waiting for
    as long as they run.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._beside = self._waiting = 0
        self._alone: int | None = None
        self._mine = threading.local()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within the block, no other thread is alone; blocks may be nested."""
        depth = getattr(self._mine, "depth", 0)
        counts = depth == 0 and self._alone != threading.get_ident()
        if counts:
            with self._condition:
                if self._waiting:
                    self._condition.wait_for(lambda: self._alone is None and not self._waiting, _COURTESY)
                self._condition.wait_for(lambda: self._alone is None)
                self._beside += 1
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            if counts:
                with self._condition:
                    self._beside -= 1
                    self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, no other thread is beside or alone; blocks may be nested, and lie in one of `beside`.

        A lock that a thread beside others may wait for must not be held at the beginning.
        """
        me = threading.get_ident()
        if self._alone == me:
            yield
            return
        counted = getattr(self._mine, "depth", 0) > 0
        with self._condition:
            self._beside -= counted
            self._waiting += 1
            self._condition.notify_all()
            try:
                self._condition.wait_for(lambda: self._alone is None and self._beside == 0)
            except BaseException:  # an interrupt
                self._beside += counted
                raise
            finally:
                self._waiting -= 1
                self._condition.notify_all()
            self._alone = me
        try:
            yield
        finally:
            with self._condition:
                self._alone = None
                self._beside += counted
                self._condition.notify_all()
