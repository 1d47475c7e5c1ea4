"""Counter-based Gaussian noise: sample i of a run has the same noise on any device, in any batch, in any process."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import consistency_step


def gaussian(
    shape: Sequence[int],
    seed: int | Tensor,
    draw: int = 0,
    first_sample: int | Tensor = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise [N, C, *spatial] that is a function of the seed, the draw and each sample's index alone.

    Philox4x32-10 and Box–Muller; the exact rule is in `cmfast.kernels.reference.philox.gaussian`.

    Args:
        shape: [N, C, *spatial].
        seed: 0 ≤ seed < 2⁶⁴; an integer, or one int64 element on the device (see `GaussianNoise`).
        draw: number of the draw; samplers keep 0 for the initial noise and count theirs from 1.
        first_sample: index of the first of the N samples; an integer or one int64 element.
        dtype: of the result; the numbers are those of float32, rounded.
        device: of the result.
        backend: name of the kernel backend that must generate it; None chooses.

    Raises:
        ValueError: an integer out of range, or a tensor that is not one int64 element on the device.
    """
    zero = torch.zeros(tuple(shape), dtype=dtype, device=device)
    return _noise(zero, seed, draw, first_sample, backend)


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """The noise of one sampling run, as samplers take it: `noise(like, draw)`.

    Where seed and first_sample are tensors, they are read on the device, without a synchronisation: a sampler that is
    captured in a CUDA graph draws the noise of what lies in them when it is replayed.

    Attributes:
        seed: of the run, 0 ≤ seed < 2⁶⁴; an integer, or an int64 tensor [] or [1] on the device of the samples, of
            which a negative value v stands for v + 2⁶⁴.
        first_sample: index of the batch's first sample in the run; an integer or a tensor, as seed is.
    """

    seed: int | Tensor
    first_sample: int | Tensor = 0

    def __call__(self, like: Tensor, draw: int) -> Tensor:
        """Standard normal noise of the shape, dtype, device and memory format of `like` [N, C, *spatial]."""
        return _noise(torch.zeros_like(like), self.seed, draw, self.first_sample, None)


def _noise(zero: Tensor, seed: int | Tensor, draw: int, first_sample: int | Tensor, backend: str | None) -> Tensor:
    # The consistency step of a zero sample: one launch, and the one generator that every backend has.
    step = consistency_step(
        zero, zero, 0.0, 0.0, alpha=0.0, beta=1.0, seed=seed, draw=draw, first_sample=first_sample, backend=backend
    )
    assert step.sample is not None
    return step.sample


def noise_arguments(noise: Callable[[Tensor, int], Tensor], like: Tensor, draw: int) -> dict[str, Any]:
    """The arguments of `consistency_step` for a sampler's noise: counter-based noise is made in its launch."""
    if isinstance(noise, GaussianNoise):
        return {"seed": noise.seed, "first_sample": noise.first_sample, "draw": draw}
    return {"noise": noise(like, draw)}
