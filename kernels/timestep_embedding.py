"""The sinusoids of timesteps, with which diffusion networks begin.

    angle[n, i] = scale · (t[n] · frequencies[i])
    y[n]        = cos(angle[n, 0]), …, cos(angle[n, F − 1]), sin(angle[n, 0]), …, sin(angle[n, F − 1])

Vaswani et al. 2017, "Attention Is All You Need", section 3.5. OpenAI's networks have the cosines first, those of DDPM
(Ho et al. 2020) the sines.
"""

import torch
from torch import Tensor

from . import direct, remembered
from .backends import resolve
from .layout import describe
from .transforms import refuse_gradients


def timestep_embedding(
    t: Tensor,
    frequencies: Tensor,
    *,
    scale: float = 1.0,
    sin_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Embed timesteps by the cosines and sines of their multiples. For inference: there are no gradients.

    Both products are rounded to the dtype of the result, as torch rounds them; cosine and sine are those of the rounded
    angle, to within two units of rounding up to angles of 10⁶.

    Args:
        t: [N] of any floating or integer dtype.
        frequencies: [F] of any floating dtype.
        scale: the angles are multiplied by it after the frequencies are.
        sin_first: the sines come before the cosines.
        backend: name of the backend that must serve the call; None chooses.

    Returns:
        y [N, 2·F], float32; float64 where t or frequencies is.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: an input requires a gradient, or a transformation of torch.func may ask for one.
        BackendError: the backend asked for cannot serve the call.
    """
    if (y := direct.timestep_embedding(t, frequencies, scale, sin_first, backend)) is not None:
        return y
    if t.ndim != 1 or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"timestep_embedding: t must be a tensor [N] of numbers, got {describe(t)}")
    if frequencies.ndim != 1 or not frequencies.is_floating_point():
        raise ValueError(
            f"timestep_embedding: frequencies must be a floating-point tensor [F], got {describe(frequencies)}"
        )
    refuse_gradients("timestep_embedding", "it serves inference", t, frequencies)
    return torch.ops.cmfast.timestep_embedding(t, frequencies, float(scale), sin_first, backend)


torch.library.define(
    "cmfast::timestep_embedding",
    "(Tensor t, Tensor frequencies, float scale, bool sin_first, str? backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("cmfast::timestep_embedding", "default")
def _timestep_embedding(t, frequencies, scale, sin_first, backend):
    serve = resolve("timestep_embedding", (t, frequencies), backend)
    arguments = (t, frequencies, scale, sin_first)
    return remembered.serve("timestep_embedding", backend, arguments, serve, *arguments)


@torch.library.register_fake("cmfast::timestep_embedding")
def _timestep_embedding_fake(t, frequencies, *_):
    dtype = torch.float64 if torch.float64 in (t.dtype, frequencies.dtype) else torch.float32
    return t.new_empty((t.shape[0], 2 * frequencies.shape[0]), dtype=dtype)
