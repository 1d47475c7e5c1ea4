"""Compute beforehand what depends on the parameters alone: transposed weights, the frequencies of an embedding."""

import operator

from torch import Tensor, fx

from ..graph import Graph, value


def fold(graph: Graph) -> int:
    """Replace each call whose inputs are all known by its result."""
    count = 0
    for node in list(graph.nodes.nodes):
        if node.op != "call_function" or node.target is operator.getitem or not isinstance(value(node), Tensor):
            continue
        if any(graph.tensor(given) is None for given in node.all_input_nodes):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), graph.tensor)
        result = node.target(*args, **kwargs)
        graph.replace(node, graph.attribute(_name(graph, node), result, node))
        count += 1
    return count


def _name(graph: Graph, node: fx.Node) -> str:
    """What was computed of what, as the cache of packed weights knows it."""
    operator_name = str(node.target).split(".")[1]
    name = f"{operator_name}({', '.join(str(given.target) for given in node.all_input_nodes)})"
    return name if name not in graph.tensors else f"{name} {node.name}"
