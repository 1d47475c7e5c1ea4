"""The engine: a network's graph in, a faster one out, and a program that runs it on the CPU.

`capture` gives the graph of a network, from one run without data; `passes` make it faster, one small file each;
`weights` packs the convolutions' in the form that `forms` chooses; `lower` turns the graph into steps, calls of the
kernels and of torch for what they lack; an `executable` is these with their memory, planned by `arena`, and runs. An
`accelerator` is all of that for one network, which `watch` keeps an eye on: what changes is captured anew. A `trace`
is what calls ran, and an `explanation` says what that was.
"""

from .accelerator import Accelerator
from .capture import CaptureError, capture

__all__ = ["Accelerator", "CaptureError", "capture"]
