"""How values lie in memory: the channels of an image are adjacent; tokens and all else lie as torch lays them."""

import itertools
from typing import Any

import torch
from torch import fx

from ..graph import CONV, VIEW, Graph, arguments, shape, value

_aten = torch.ops.aten

#: operator: the names of its arguments that are images, which the kernels read with their channels adjacent.
READERS: dict[Any, tuple[str, ...]] = {
    CONV: ("h", "skip", "residual"),
    torch.ops.cmfast.group_norm.default: ("h", "skip"),
    torch.ops.cmfast.channel_moments.default: ("x",),
    torch.ops.cmfast.channel_norm.default: ("x",),
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
    return (even or target is CONV) and (x.shape[1] == 1 or x.stride(1) == 1)


def images(graph: Graph) -> set[fx.Node]:
    """The values [N, C, *spatial] whose channels a kernel, at the end, wants adjacent."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes.nodes):
        if any(_is_read_as_image(node, user, found) for user in node.users):
            found.add(node)
    return found


def _is_read_as_image(node: fx.Node, user: fx.Node, found: set[fx.Node]) -> bool:
    if not isinstance(value(node), torch.Tensor) or len(shape(node)) < 3 or not value(node).is_floating_point():
        return False
    if user.target in READERS:
        given = arguments(user)
        return any(given[name] is node for name in READERS[user.target])
    if user not in found:
        return False
    if user.target is VIEW:
        return shape(user)[:2] == shape(node)[:2]
    pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ()) and shape(user) == shape(node)
    return pointwise or (user.target in _IMAGES and len(shape(user)) == len(shape(node)))
