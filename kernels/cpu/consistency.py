"""The consistency step through csrc/cpu/kernels/consistency.cpp, in one pass."""

from collections.abc import Sequence

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
    sample = empty_in_order(x, x.shape) if wants_sample else None
    model_input = empty_in_order(x, x.shape, model_output.dtype) if wants_input else None
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
            [None if v is None else (v.data_ptr(), v.stride(0)) for v in vectors],
            scalars,
            low,
            high,
            None if seed is None else int(seed),
            draw,
            int(first_sample) & 0xFFFFFFFF,
        )
    return [t for t in (denoised, sample, model_input) if t is not None]


def _tensor(t: Tensor | None) -> tuple[int, int, Sequence[int]] | None:
    return None if t is None else (t.data_ptr(), native.DTYPES[t.dtype], t.stride())
