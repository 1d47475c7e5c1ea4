"""A convolution, or a group norm, of a concatenation along the channels reads both tensors where they lie."""

import torch

from ..graph import CONV, Graph, arguments, change, shape

_NORM = torch.ops.cmfast.group_norm.default


def read_pairs(graph: Graph) -> int:
    """Let conv2d and group norm calls take the pair (h, skip) that was concatenated for them."""
    count = 0
    for node in graph.calls(CONV, _NORM):
        a = arguments(node)
        joined = a["h"]
        if a["skip"] is not None or joined.target is not torch.ops.aten.cat.default:
            continue
        parts = joined.args[0]
        if len(parts) != 2 or list(joined.args[1:]) != [1] or any(len(shape(part)) != 4 for part in parts):
            continue
        change(node, h=parts[0], skip=parts[1])
        graph.erase(joined)
        count += 1
    return count
