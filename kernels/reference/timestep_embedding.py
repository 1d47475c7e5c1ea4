"""The definition of `cmfast.kernels.timestep_embedding`."""

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, sin_first: bool) -> Tensor:
    """Return y [N, 2·F] in float32, or in float64 where an input is."""
    dtype = torch.float64 if torch.float64 in (t.dtype, frequencies.dtype) else torch.float32
    angles = t.to(dtype)[:, None] * frequencies.to(dtype)
    if scale != 1:
        angles = angles * scale
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((sin, cos) if sin_first else (cos, sin), 1)
