"""Bulk sampling: many samples, written to a folder in shards by any number of processes, which may be killed.

`Run` is what is made of a model; `process_of` tells which of how many processes this one is.
"""

from .formats import FORMATS
from .processes import Process, process_of
from .run import Run
from .shards import Shard, Shards

__all__ = ["FORMATS", "Process", "Run", "Shard", "Shards", "process_of"]
