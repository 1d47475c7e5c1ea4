"""A convolution or a group norm of a concatenation along the channels reads both tensors where they lie."""

import torch

from ..graph import CONV, Graph, arguments, change, dtype, shape

_NORM = torch.ops.cmfast.group_norm.default


def read_pairs(graph: Graph) -> int:
    """Let conv2d and group_norm calls take the pair (h, skip) that was concatenated for them."""
    count = 0
    for node in graph.calls(CONV, _NORM):
        a = arguments(node)
        joined = a["h"]
        if a["skip"] is not None or joined.target is not torch.ops.aten.cat.default:
            continue
        parts = joined.args[0]
        same = all(len(shape(part)) == len(shape(joined)) and dtype(part) == dtype(joined) for part in parts)
        if len(parts) != 2 or arguments(joined)["dim"] not in (1, 1 - len(shape(joined))) or not same:
            continue
        change(node, h=parts[0], skip=parts[1])
        graph.erase(joined)
        count += 1
    return count
