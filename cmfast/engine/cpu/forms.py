"""Which form of a convolution serves a layer of a network: where the dtype of its products is the network's own.

Instruction sets without products of bfloat16 make two of float32 of each pair. There bfloat16 gains only where reading
the weights takes the time: with few rows to multiply them with. Everything else is multiplied in float32.
"""

import math

import torch
from torch import fx

from ...kernels import native
from ...kernels.conv_forms import SPLIT, ConvForm, choose_form, conv_forms, has_tiles
from ..graph import arguments, shape

#: With fewer channels on either side a convolution costs next to nothing, and stays in float32. By tiles fewer outputs
#: cost no more than so many, and far less than reading a large image in float32 does.
_FEW_CHANNELS = 16

#: Outputs of a channel's image from which on bfloat16 products have tiles of 4. They cost more accuracy than tiles of
#: 2, and a network with them less than torch's bfloat16, in which the values between layers are rounded as well.
_LARGE_TILES_IN_BFLOAT16 = 256

#: Positions of a sample up to which reading a layer's weights takes longer than the arithmetic, if samples are few.
_FEW_POSITIONS = 8

#: Elements of the weights from which on operands are split. Networks of so large layers have many of them, whose errors
#: are small beside the whole; of a single layer 4.4e-6 would be the whole.
_SPLIT_WEIGHTS = 1 << 17

#: Positions of an image from which on the rows of a tile are its own.
_TILE_ROWS = 16

#: Outputs of an image up to which the direct form of split operands is faster than Winograd's F(4 x 4); of convolutions
#: of one element it always is.
_SPLIT_POSITIONS = 1024


def multiplies(products: torch.dtype) -> bool:
    """Whether the instruction set in use has products of this dtype."""
    return products == torch.float32 or native.cpu().build_info()["isa"] in ("amx", "avx512bf16")


def attention_products(products: torch.dtype) -> torch.dtype:
    """The dtype of the operands of attention's products in a network whose products are to be of this dtype."""
    return products if multiplies(products) else torch.float32


def images(products: torch.dtype) -> torch.dtype | None:
    """The dtype of the values between layers, where it is not the graph's own.

    Products by tiles take less time than their operands' way through memory, which is half as long in bfloat16.
    """
    return torch.bfloat16 if products == torch.bfloat16 and has_tiles() else None


def choose(node: fx.Node, products: torch.dtype) -> ConvForm:
    """The form of a conv2d call; it does not depend on the number of samples, so that a sample's bits do not either."""
    a = arguments(node)
    weight, outputs = shape(a["weight"]), node.meta["val"][0].shape[2:]
    gains = multiplies(products) or math.prod(outputs) <= _FEW_POSITIONS
    few = weight[1] if has_tiles() else min(weight[:2])
    dtype = products if gains and few >= _FEW_CHANNELS else torch.float32
    large = ConvForm(4, True, torch.bfloat16)
    if (
        not has_tiles()
        and math.prod(outputs[-2:]) >= _LARGE_TILES_IN_BFLOAT16
        and large in conv_forms(weight, a["stride"], dtype)
    ):
        return large
    if dtype == torch.float32 and _splits(node):
        return SPLIT
    return choose_form(weight, a["stride"], outputs, dtype)


def _splits(node: fx.Node) -> bool:
    """Whether products of float32 are those of split operands, by tiles.

    Only of convolutions that read a norm's output. Others pass on what they read, as shortcuts do, or are added to it:
    their error is that of all layers after them, and with theirs the UNet of Stable Diffusion 1.5 errs by 1.1e-5.
    """
    a = arguments(node)
    weight, outputs = shape(a["weight"]), node.meta["val"][0].shape[2:]
    gains = math.prod(weight) >= _SPLIT_WEIGHTS and math.prod(outputs) >= _TILE_ROWS
    if a["gain"] is None or not gains or (math.prod(weight[2:]) > 1 and math.prod(outputs) > _SPLIT_POSITIONS):
        return False
    return SPLIT in conv_forms(weight, a["stride"], torch.float32)


def candidates(node: fx.Node, products: torch.dtype) -> list[ConvForm]:
    """The forms that can serve a conv2d call, all accurate enough."""
    a, chosen = arguments(node), choose(node, products)
    forms = conv_forms(shape(a["weight"]), a["stride"], chosen.dtype)
    if chosen == SPLIT or chosen.tile == 1:
        winograd = chosen == SPLIT and len(forms) > 2
        return [f for f in forms if f == chosen or (winograd and f.tile > 1)]
    largest = chosen.tile if chosen.dtype == torch.bfloat16 else 4
    return [f for f in forms if 1 < f.tile <= largest]
