"""Which form of a convolution serves a layer: the tile of Winograd's filtering, and the dtype of the products."""

from typing import NamedTuple

import torch
from torch import fx

from ...kernels.conv import CONV_FORMS, choose_tile, transform_at_use
from ..graph import arguments, shape

#: With fewer channels on either side a convolution costs next to nothing, and stays in float32.
_FEW_CHANNELS = 16

#: Outputs of a channel from which on bfloat16 products have tiles of 4. They cost more accuracy than tiles of 2, and a
#: network with them less than torch's bfloat16, in which the values between layers are rounded as well.
_LARGE_TILES_IN_BFLOAT16 = 256


class Form(NamedTuple):
    """How a convolution is computed.

    Attributes:
        tile: outputs a side of a Winograd tile; 1 for the direct form.
        transformed: Winograd's weights are packed transformed, not transformed as they are used.
        dtype: of the operands of products.
    """

    tile: int
    transformed: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        """Its name in files and tables."""
        winograd = f"F({self.tile}x{self.tile})" + ("" if self.transformed else ", transformed at use")
        return f"{winograd if self.tile > 1 else 'direct'}, {str(self.dtype).removeprefix('torch.')}"


def choose(node: fx.Node, products: torch.dtype) -> Form:
    """The form of a conv2d call, by a rule from measurements (benchmarks/cpu_conv.py)."""
    a = arguments(node)
    out_channels, in_channels, kernel = shape(a["weight"])[:3]
    dtype = torch.float32 if min(out_channels, in_channels) < _FEW_CHANNELS else products
    if kernel != 3 or a["stride"] != 1:
        return Form(1, False, dtype)
    height, width = node.meta["val"][0].shape[2:]
    if dtype == torch.bfloat16:
        return Form(4 if height * width >= _LARGE_TILES_IN_BFLOAT16 else 2, True, dtype)
    at_use = transform_at_use(a["weight"].meta["val"], height * width)
    return Form(choose_tile(height * width, dtype), not at_use, dtype)


def candidates(node: fx.Node, products: torch.dtype) -> list[Form]:
    """The forms that can serve a conv2d call, all accurate enough."""
    chosen = choose(node, products)
    if chosen.tile == 1:
        return [chosen]
    largest = chosen.tile if chosen.dtype == torch.bfloat16 else 4
    forms = CONV_FORMS[chosen.dtype]
    return [Form(tile, transformed, chosen.dtype) for tile, transformed in forms if 1 < tile <= largest]
