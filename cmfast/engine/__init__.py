"""The engine: a network's graph in, a faster one out, and what runs it on a device.

`capture` gives the graph of a network, from one run without data; `passes` make it faster, one small file each;
`lower` turns it into steps, calls of a target's kernels and of torch for what they lack (`by_torch`), whose values lie
in memory as `layouts` says; an executable is these with their memory, planned by `arena`, and runs. A `target` is the
device: `cpu` packs the weights in the form that it chooses for each convolution. An `accelerator` is all of that for
one network, which `watch` keeps an eye on: what changes is captured anew. A `trace` is what calls ran, and an
`explanation` says what that was.
"""

from .accelerator import Accelerator
from .capture import CaptureError, capture

__all__ = ["Accelerator", "CaptureError", "capture"]
