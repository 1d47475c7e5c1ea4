"""Modules that are in evaluation mode for a while, whatever mode they were in, by any number of threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_lock = threading.Lock()
#: How many threads hold a module that is in training mode otherwise, by its identity.
_held: dict[int, int] = {}


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Within the block all modules are in evaluation mode; after the last such block each is in its own again."""
    held = []
    with _lock:
        for m in module.modules():
            if m.training or id(m) in _held:  # another thread holds it as well
                m.training = False
                _held[id(m)] = _held.get(id(m), 0) + 1
                held.append(m)
    try:
        yield
    finally:
        with _lock:
            for m in held:
                _held[id(m)] -= 1
                if not _held[id(m)]:
                    del _held[id(m)]
                    m.training = True
