"""A ReLU of a convolution's output is applied as that is written."""

import torch

from ..graph import CONV, Graph, arguments, change, convolution_of, only_user

_RELU = torch.ops.aten.relu.default


def fuse(graph: Graph) -> int:
    """Let conv2d calls whose output is read by a ReLU alone write what that makes of it."""
    count = 0
    for node in graph.calls(_RELU):
        out = node.all_input_nodes[0]
        call = convolution_of(out)
        if call is None or only_user(out) is None or len(call.users) > 1 or arguments(call)["relu"]:
            continue
        assert call.target is CONV
        change(call, relu=True)
        graph.replace(node, out)
        count += 1
    return count
