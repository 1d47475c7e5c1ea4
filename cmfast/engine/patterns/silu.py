"""SiLU by its definition, x · sigmoid(x), as in DDPM's and latent diffusion's networks."""

import itertools

import torch
from torch import fx

from ..graph import Graph, dtype

_aten = torch.ops.aten


def recognise(graph: Graph) -> int:
    """Put aten.silu for products of a value with its own sigmoid."""
    count = 0
    for node in graph.calls(_aten.mul.Tensor):
        for x, sigmoid in itertools.permutations(node.args):
            of_x = isinstance(sigmoid, fx.Node) and sigmoid.target is _aten.sigmoid.default and sigmoid.args[0] is x
            if of_x and dtype(x) == dtype(node):  # of integers there is no SiLU
                graph.replace(node, graph.like(node, _aten.silu.default, x))
                count += 1
                break
    return count
