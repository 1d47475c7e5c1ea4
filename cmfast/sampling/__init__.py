"""Samplers: free functions of a denoiser, the initial noise and a grid of levels.

A sampler knows nothing of networks: `denoiser(x, sigma)` takes samples [N, C, *spatial] and levels [N].
"""

from collections.abc import Callable

from torch import Tensor

from .consistency import sample_multistep, sample_onestep
from .diffusion import (
    sample_ancestral,
    sample_ddim,
    sample_dpm2,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
    sample_progdist,
)
from .schedules import karras_sigmas

#: The samplers by the names that `model.sample(sampler=...)` and the command take.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "onestep": sample_onestep,
    "multistep": sample_multistep,
    "heun": sample_heun,
    "euler": sample_euler,
    "dpm2": sample_dpm2,
    "dpmpp_2m": sample_dpmpp_2m,
    "ancestral": sample_ancestral,
    "ddim": sample_ddim,
    "progdist": sample_progdist,
}

__all__ = [
    "SAMPLERS",
    "karras_sigmas",
    "sample_ancestral",
    "sample_ddim",
    "sample_dpm2",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "sample_multistep",
    "sample_onestep",
    "sample_progdist",
]
