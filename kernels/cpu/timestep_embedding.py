"""The sinusoids of timesteps through csrc/cpu/kernels/timestep_embedding.cpp."""

import torch
from torch import Tensor

from .. import native


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, sin_first: bool) -> Tensor:
    """Serve `cmfast.kernels.timestep_embedding`; arguments and result are those of the reference."""
    n, count = len(t), len(frequencies)
    y = frequencies.new_empty((n, 2 * count), dtype=torch.float32)
    if y.numel():
        t, frequencies = t.float(), frequencies.float().contiguous()
        times = (t.data_ptr(), t.stride(0))
        native.run("timestep_embedding", n, count, times, frequencies.data_ptr(), scale, sin_first, y.data_ptr())
    return y
