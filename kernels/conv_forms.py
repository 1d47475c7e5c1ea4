"""The forms of a convolution, and the one that serves a layer: its tile, how its weights are packed, its products."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import native

_DIRECT = ((1, False),)

#: The forms (tile, transformed) of kernels of 3 x 3 elements and stride 1 (of every image, where there is a depth), by
#: the dtype of the products. An engine that measures may take any in float32; F(4 × 4) in bfloat16 where its error is
#: allowed.
CONV_FORMS = {
    torch.float32: (*_DIRECT, (2, True), (2, False), (4, True), (4, False)),
    torch.bfloat16: (*_DIRECT, (2, True), (4, True)),
}


class ConvForm(NamedTuple):
    """How a convolution is computed.

    Attributes:
        tile: outputs a side of a Winograd tile; 1 for the direct form.
        transformed: Winograd's weights are packed transformed, not transformed as they are used. Of the direct form in
            float32: they are packed as two bfloat16 terms each, for a processor's tiles (`SPLIT`).
        dtype: of the operands of products.
    """

    tile: int
    transformed: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        """Its name in files and tables."""
        if self == SPLIT:
            return "direct, float32 of two bfloat16"
        winograd = f"F({self.tile}x{self.tile})" + ("" if self.transformed else ", transformed at use")
        return f"{winograd if self.tile > 1 else 'direct'}, {str(self.dtype).removeprefix('torch.')}"


#: The direct form in float32 by a processor's tiles, whose products are of bfloat16: each operand is the sum of two,
#: and three of their four products are taken. A convolution's relative error is 4.4e-6; that of F(4 x 4) is 1.5e-6.
SPLIT = ConvForm(1, True, torch.float32)


def conv_forms(weight: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> list[ConvForm]:
    """The forms that serve weights of this shape [Cout, Cin, *kernel], with a stride for each spatial dimension."""
    winograd = tuple(weight[2:][-2:]) == (3, 3) and tuple(stride[-2:]) == (1, 1)
    forms = [ConvForm(*form, dtype) for form in (CONV_FORMS[dtype] if winograd else _DIRECT)]
    return [*forms, SPLIT] if dtype == torch.float32 and has_tiles() else forms


def choose_form(
    weight: Sequence[int],
    stride: Sequence[int],
    outputs: Sequence[int],
    dtype: torch.dtype,
    *,
    tile: int | None = None,
    transformed: bool | None = None,
) -> ConvForm:
    """The form for weights of this shape [Cout, Cin, *kernel], by a rule from measurements (benchmarks/cpu_conv.py).

    Args:
        weight: the shape.
        stride: of each spatial dimension.
        outputs: the output's spatial sizes.
        dtype: of the operands of products.
        tile: what the form shall have; None chooses.
        transformed: the same.

    Raises:
        ValueError: there is no such form.
    """
    forms = conv_forms(weight, stride, dtype)
    if tile is None:
        tile = _tile(math.prod(outputs[-2:]), dtype) if any(form.tile > 1 for form in forms) else 1
    if transformed is None:
        at_use = dtype == torch.float32 and _transforms_at_use(weight, math.prod(outputs))
        transformed = tile > 1 and not at_use
    form = ConvForm(tile, transformed, dtype)
    if form not in forms:
        known = ", ".join(str(tuple(found[:2])) for found in forms)
        raise ValueError(
            f"kernels of {_times(weight[2:])} and stride {_times(stride)} in {dtype} have the forms "
            f"(tile, transformed) {known}: got {(tile, transformed)}"
        )
    return form


def has_tiles() -> bool:
    """Whether the instruction set of the CPU kernels has products of bfloat16 by tiles (Intel AMX)."""
    try:
        return bool(native.cpu().build_info()["tiles"])
    except ImportError:
        return False


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _tile(outputs: int, dtype: torch.dtype) -> int:
    """The tile for so many outputs of an image: below 4 of the larger tiles, the smaller ones leave less unused.

    A processor's own tiles multiply bfloat16 faster than what goes through Winograd's transformations can be read.
    """
    if dtype == torch.bfloat16 and has_tiles():
        return 1
    return 4 if dtype == torch.float32 and outputs > 16 else 2


def _transforms_at_use(weight: Sequence[int], outputs: int) -> bool:
    """Whether so few outputs use so large weights that reading them transformed takes longer than transforming them.

    At 16 x 16 it takes a few percent longer to transform them; there it is done for the memory, a quarter of the whole.
    """
    return outputs <= 256 and math.prod(weight) > 9 * 256 * 256
