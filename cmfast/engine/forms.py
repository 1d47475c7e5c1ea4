"""Which form of a convolution serves a layer: the tile of Winograd's filtering, and the dtype of the products."""

from typing import NamedTuple

import torch
from torch import fx

from ..kernels.conv import choose_tile
from .graph import arguments, shape

#: With fewer channels on either side a convolution costs next to nothing, and stays in float32.
_FEW_CHANNELS = 16


class Form(NamedTuple):
    """How a convolution is computed.

    Attributes:
        tile: outputs a side of a Winograd tile; 1 for the direct form.
        dtype: of the operands of products.
    """

    tile: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.tile}.{str(self.dtype).removeprefix('torch.')}"


def candidates(node: fx.Node, products: torch.dtype) -> list[Form]:
    """The forms that can serve a conv2d call, all accurate enough."""
    chosen = choose(node, products)
    if chosen.tile == 1:
        return [chosen]
    return [Form(tile, chosen.dtype) for tile in (2, 4)]


def choose(node: fx.Node, products: torch.dtype) -> Form:
    """The form of a conv2d call."""
    a = arguments(node)
    out_channels, in_channels, kernel = shape(a["weight"])[:3]
    dtype = torch.float32 if min(out_channels, in_channels) < _FEW_CHANNELS else products
    if kernel != 3 or a["stride"] != 1:
        return Form(1, dtype)
    height, width = node.meta["val"][0].shape[2:]
    return Form(choose_tile(height, width, dtype), dtype)
