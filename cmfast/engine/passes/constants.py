"""Compute beforehand what depends on the parameters alone: transposed weights, the frequencies of an embedding."""

import operator
import re

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph import Graph

_aten = torch.ops.aten


def fold(graph: Graph) -> int:
    """Replace each call whose inputs are all known by its result."""
    count = 0
    for node in list(graph.nodes.nodes):
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if any(graph.tensor(given) is None for given in node.all_input_nodes):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), graph.tensor)
        if any(graph.tensor(given).is_meta for given in node.all_input_nodes):  # type: ignore[union-attr]
            # Of weights that were given up: what was packed of them is known by its name.
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        # A copy before a view is taken out of the graph: what it made adjacent may be an expanded tensor here.
        target = _aten.reshape.default if node.target is _aten.view.default else node.target
        result = target(*args, **kwargs)
        name = _name(node)
        if isinstance(result, Tensor):
            graph.replace(node, graph.attribute(name, result, node))
        else:
            for item in list(node.users):  # such as those of unbind
                i = item.args[1]
                graph.replace(item, graph.attribute(f"{name}[{i}]", result[i], node))
        count += 1
    return count


def _name(node: fx.Node) -> str:
    """The expression that was computed, with all its arguments: the name of packed weights tells what they are."""
    given = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
    read = {str(attribute): str(attribute.target) for attribute in node.all_input_nodes}
    words = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in read)) if read else None
    text = ", ".join(given)
    return f"{node.target}({words.sub(lambda match: read[match[0]], text) if words else text})"
