"""The sinusoids of timesteps without torch's dispatcher."""

import torch
from torch import Tensor

from .. import backends, remembered
from ..native import DTYPES, INTEGERS
from . import plain


def timestep_embedding(
    t: Tensor, frequencies: Tensor, scale: float, sin_first: bool, backend: str | None = None
) -> Tensor | None:
    """`cmfast.kernels.timestep_embedding` in float32."""
    if not plain.is_plain((t, frequencies)) or t.ndim != 1 or frequencies.ndim != 1:
        return None
    backend = backend or backends.override()
    if backend is not None or not t.is_cpu:
        return remembered.recall("timestep_embedding", backend, (t, frequencies, scale, sin_first))
    if (t.dtype not in DTYPES and t.dtype not in INTEGERS) or frequencies.dtype not in DTYPES:
        return None
    y = torch.empty((t.shape[0], 2 * frequencies.shape[0]), dtype=torch.float32, device="cpu")
    return y if plain.ran("timestep_embedding_of", y, t.float(), frequencies.float(), scale, sin_first) else None
