"""Group norm by given moments without torch's dispatcher."""

from torch import Tensor

from .. import backends, remembered
from ..layout import concatenated_shape, empty_image
from . import plain


def apply_group_norm(
    h: Tensor,
    skip: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    resample: str | None,
    backend: str | None = None,
) -> Tensor | None:
    """`cmfast.kernels.apply_group_norm` without resampling, of what `group_norm` takes and contiguous moments."""
    if not plain.is_plain((h, skip, first, second, weight, bias, add, scale, shift)):
        return None
    if activation not in (None, "silu") or h.ndim < 2 or not h.numel():
        return None
    backend = backend or backends.override()
    if backend is not None or not h.is_cpu:
        numbers = (eps, add, scale, shift, activation is not None, resample)
        arguments = (h, skip, first, second, num_groups, weight, bias, *numbers)
        return remembered.recall("apply_group_norm", backend, arguments)
    if resample is not None or (skip is not None and skip.ndim != h.ndim):
        return None
    y = empty_image(h, h.shape if skip is None else concatenated_shape(h, skip))
    given = (h, skip, first, second, num_groups, weight, bias, add, scale, shift)
    return y if plain.ran("apply_group_norm_of", y, *given, eps, activation is not None) else None
