"""The consistency step through csrc/cpu/kernels/consistency.cpp, and its gradient through consistency_backward.cpp.

Each is one pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..layout import empty_in_order


def consistency_step(
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise: Tensor | None,
    seed: int | Tensor | None,
    draw: int,
    first_sample: int | Tensor,
    wants_sample: bool,
    wants_input: bool,
) -> list[Tensor]:
    """Serve `cmfast.kernels.consistency_step`; arguments and results are those of the reference."""
    denoised = empty_in_order(x, x.shape)
    sample = torch.empty_like(denoised) if wants_sample else None
    model_input = torch.empty_like(denoised, dtype=model_output.dtype) if wants_input else None
    if x.numel():
        vectors = [v if v is None else v.float() for v in vectors]  # a name that holds the copies until the call
        native.run(
            "consistency_step",
            x.shape,
            _tensor(x),
            _tensor(model_output),
            _tensor(noise),
            _tensor(denoised),
            _tensor(sample),
            _tensor(model_input),
            [_vector(v) for v in vectors],
            scalars,
            low,
            high,
            None if seed is None else int(seed),
            draw,
            int(first_sample) & 0xFFFFFFFF,
        )
    return [t for t in (denoised, sample, model_input) if t is not None]


def consistency_step_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    model_output: Tensor,
    vectors: Sequence[Tensor | None],
    scalars: Sequence[float],
    low: float | None,
    high: float | None,
    noise_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Serve `cmfast.kernels.consistency_step_backward`; arguments and results are those of the reference."""
    dx = empty_in_order(x, x.shape)
    doutput = empty_in_order(x, x.shape, model_output.dtype)
    dtype = noise_dtype if noise_dtype in native.DTYPES else torch.float32
    dnoise = None if noise_dtype is None else empty_in_order(x, x.shape, dtype)
    if x.numel():
        vectors = [v if v is None else v.float() for v in vectors]  # a name that holds the copies until the call
        native.run(
            "consistency_step_backward",
            x.shape,
            [_tensor(g) for g in grads],
            _tensor(x),
            _tensor(model_output),
            _tensor(dx),
            _tensor(doutput),
            _tensor(dnoise),
            [_vector(v) for v in vectors],
            scalars,
            low,
            high,
        )
    return [dx, doutput] if dnoise is None or noise_dtype is None else [dx, doutput, dnoise.to(noise_dtype)]


def _vector(v: Tensor | None) -> tuple[int, int] | None:
    return None if v is None else (v.data_ptr(), v.stride(0))


def _tensor(t: Tensor | None) -> tuple[int, int, Sequence[int]] | None:
    return None if t is None else (t.data_ptr(), native.DTYPES[t.dtype], t.stride())
