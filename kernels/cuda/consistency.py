"""The consistency step and its derivative through csrc/cuda/consistency.cu, one launch each."""

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
        vectors = _float32(vectors)  # a name that holds the copies until the launch
        native.launch(
            "consistency_step",
            x,
            x.shape,
            _tensor(x),
            _tensor(model_output),
            _tensor(noise),
            _tensor(denoised),
            native.address(sample),
            native.address(model_input),
            _addresses(vectors),
            scalars,
            low,
            high,
            *_index(seed),
            draw,
            *_index(first_sample),
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
    """Serve the gradients of the consistency step; arguments and results are those of the reference."""
    dx = empty_in_order(x, x.shape)
    d_output = empty_in_order(x, x.shape, model_output.dtype)
    dtype = noise_dtype if noise_dtype in native.DTYPES else torch.float32
    d_noise = None if noise_dtype is None else empty_in_order(x, x.shape, dtype)
    if x.numel():
        vectors = _float32(vectors)  # a name that holds the copies until the launch
        native.launch(
            "consistency_step_backward",
            x,
            x.shape,
            [_tensor(grad) for grad in grads],
            _tensor(x),
            _tensor(model_output),
            _tensor(dx),
            native.address(d_output),
            native.address(d_noise),
            0 if noise_dtype is None else native.DTYPES[dtype],
            _addresses(vectors),
            scalars,
            low,
            high,
        )
    return [dx, d_output] if d_noise is None or noise_dtype is None else [dx, d_output, d_noise.to(noise_dtype)]


def _tensor(t: Tensor | None) -> tuple[int, int, Sequence[int]] | None:
    return None if t is None else (native.address(t), native.DTYPES[t.dtype], t.stride())


def _addresses(vectors: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
    return [None if v is None else (native.address(v), v.stride(0)) for v in vectors]


def _index(value: int | Tensor | None) -> tuple[int | None, int]:
    """A host integer, and the address that the kernel reads it from instead, or 0."""
    return (0, native.address(value)) if isinstance(value, Tensor) else (value, 0)


def _float32(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The coefficients as the kernels read them: a conversion, and its launch, only where they are not float32."""
    return [v if v is None else v.float() for v in vectors]
