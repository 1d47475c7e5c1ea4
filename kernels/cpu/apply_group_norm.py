"""Group norm by given moments through csrc/cpu/kernels/group_norm.cpp, which then takes no statistics."""

from torch import Tensor

from .. import native
from ..layout import concatenated_shape, empty_image
from ..reference.conv import resampled
from ..tiles import make_operand
from .group_norm import as_output, sizes_of
from .operands import planes, row, row_address


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
    silu: bool,
    resample: str | None,
) -> Tensor:
    """Serve `cmfast.kernels.apply_group_norm`; arguments and results are those of the reference.

    What does not lie in the order of the output is copied first. Values are resampled by torch, in float32.
    """
    if resample is not None:
        wide = (h.float(), None if skip is None else skip.float(), first, second, num_groups)
        y = resampled(apply_group_norm(*wide, weight, bias, eps, add, scale, shift, silu, None), resample)
        return empty_image(h, y.shape).copy_(y)
    y = empty_image(h, concatenated_shape(h, skip))
    if not y.numel():
        return y
    output = make_operand(y, y)
    inputs = [as_output(x, output) for x in (h, skip) if x is not None]
    moments = [m.contiguous() for m in (first, second) if m is not None]
    rows = [row(x) for x in (weight, bias, add, scale, shift)]
    native.run(
        "apply_group_norm",
        *sizes_of(output, num_groups),
        planes(inputs[0]),
        planes(inputs[1]) if skip is not None else None,
        planes(output),
        [row_address(x) for x in rows],
        eps,
        silu,
        _channels(moments[0]),
        _channels(moments[1]) if second is not None else None,
    )
    return y


def _channels(moments: Tensor) -> tuple[int, int]:
    return moments.data_ptr(), moments.shape[2]
