"""A group norm before convolutions becomes a multiply-add a channel, applied with its SiLU as they read their input.

Its statistics come from the convolutions that made the input, which take them as they write it; of what is not a
convolution's output they are taken by an operator of their own.
"""

import torch
from torch import fx

from ..graph import CONV, VIEW, Graph, arguments, change, convolution_of, shape

_NORM = torch.ops.cmfast.group_norm.default
_FOLD = torch.ops.cmfast.fold_group_norm.default
_MOMENTS = torch.ops.cmfast.channel_moments.default


def fuse(graph: Graph) -> int:
    """Fold the group norms, with weight and bias, of images that are read by conv2d calls alone."""
    count = 0
    for norm in graph.calls(_NORM):
        out = graph.item(norm, 0)
        readers = list(out.users)
        affine = arguments(norm)["weight"] is not None and arguments(norm)["bias"] is not None
        if affine and set(norm.users) == {out} and readers and all(_reads_it_plain(reader, out) for reader in readers):
            _fold(graph, norm, readers)
            count += 1
    return count


def _reads_it_plain(reader: fx.Node, out: fx.Node) -> bool:
    """Whether a node convolves the norm's output and does nothing to it before."""
    if reader.target is not CONV:
        return False
    a = arguments(reader)
    others = (a["skip"], a["residual"], a["gain"])
    return a["h"] is out and out not in others and a["skip"] is None and a["gain"] is None and not a["silu"]


def _fold(graph: Graph, norm: fx.Node, readers: list[fx.Node]) -> None:
    a = arguments(norm)
    h, skip = a["h"], a["skip"]
    gain_offset = graph.call(
        norm,
        _FOLD,
        _moments(graph, norm, h),
        None if skip is None else _moments(graph, norm, skip),
        shape(h)[2] * shape(h)[3],
        a["num_groups"],
        a["weight"],
        a["bias"],
        a["eps"],
        a["add"],
        a["scale"],
        a["shift"],
        None,
    )
    gain, offset = graph.item(gain_offset, 0), graph.item(gain_offset, 1)
    out = graph.item(norm, 0)
    for reader in readers:
        change(reader, h=h, skip=skip, gain=gain, offset=offset, silu=a["silu"])
    graph.erase(out)


def _moments(graph: Graph, before: fx.Node, x: fx.Node) -> fx.Node:
    call = convolution_of(x.args[0] if x.target is VIEW and shape(x.args[0])[:2] == shape(x)[:2] else x)
    if call is None:
        return graph.call(before, _MOMENTS, x, None)
    if not arguments(call)["moments"]:
        change(call, moments=True)
        call.meta["val"] = (call.meta["val"][0], call.meta["val"][0].new_empty(shape(x)[0], 2, shape(x)[1]))
    return graph.item(call, 1)
