"""How values lie in memory: the channels of an image are adjacent; tokens and all else lie as torch lays them."""

import itertools
from typing import Any

import torch
from torch import fx

from ..kernels.layout import channels_adjoin
from .graph import CONV, PERMUTE, VIEW, Graph, arguments, operands, shape, value

_aten = torch.ops.aten

#: operator: the names of its arguments that are images, which the kernels read with their channels adjacent.
READERS: dict[Any, tuple[str, ...]] = {
    CONV: ("h", "skip", "residual"),
    torch.ops.cmfast.group_norm.default: ("h", "skip"),
    torch.ops.cmfast.apply_group_norm.default: ("h", "skip"),
    torch.ops.cmfast.channel_moments.default: ("x",),
    torch.ops.cmfast.channel_norm.default: ("x",),
}
#: operator: which of its results are rows, whose last dimension is innermost whoever computes them.
ROWS: dict[Any, tuple[int, ...]] = {
    CONV: (1,),
    torch.ops.cmfast.channel_moments.default: (0,),
    torch.ops.cmfast.attention.default: (1,),
}
#: What makes an image of images and is fastest where both lie alike, beside all that is done element by element.
_IMAGES = (
    _aten.cat.default,
    _aten.constant_pad_nd.default,
    _aten.reflection_pad2d.default,
    _aten.replication_pad2d.default,
    _aten.avg_pool2d.default,
    _aten.upsample_nearest1d.default,
    _aten.upsample_nearest2d.default,
    _aten.upsample_nearest3d.default,
    _aten.slice.Tensor,
    _aten.clone.default,
)


def fits(target: Any, x: torch.Tensor) -> bool:
    """Whether an operator's kernel can read the image x as it lies: its channels are adjacent.

    All but convolutions also want the positions evenly spaced in their order, neither cropped nor transposed.
    """
    spatial = [d for d in range(2, x.ndim) if x.shape[d] > 1]
    even = all(x.stride(a) == x.stride(b) * x.shape[b] for a, b in itertools.pairwise(spatial))
    return (even or target is CONV) and channels_adjoin(x)


def images(graph: Graph) -> set[fx.Node]:
    """The values [N, C, *spatial] whose channels a kernel, at the end, wants adjacent."""
    channels: dict[fx.Node, int] = {}  # the dimension of what is wanted so, seen through views and permutations
    for node in reversed(graph.nodes.nodes):
        for user in node.users:
            dim = _channels(node, user, channels.get(user))
            if dim is not None:
                channels[node] = dim
    return {node for node, dim in channels.items() if dim == 1}


def _channels(node: fx.Node, user: fx.Node, wanted: int | None) -> int | None:
    """The channels' dimension of a value, if it is read as an image or `wanted` is that of what is made of it."""
    if not isinstance(value(node), torch.Tensor) or len(shape(node)) < 3 or not value(node).is_floating_point():
        return None
    if user.target in READERS:
        given = arguments(user)
        return 1 if any(given[name] is node for name in READERS[user.target]) else None
    if wanted is None:
        return None
    if user.target is PERMUTE:
        return int(operands(user)[1][wanted])
    if user.target is VIEW:
        after = shape(user)[wanted:]
        before = len(shape(node)) - len(after)
        if before > 0 and shape(node)[before:] == after:  # what lies outside them was joined or taken apart
            return before
        return wanted if shape(user)[: wanted + 1] == shape(node)[: wanted + 1] else None
    same = len(shape(user)) == len(shape(node))
    pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ()) and shape(user) == shape(node)
    return wanted if pointwise or (user.target in _IMAGES and same) else None
