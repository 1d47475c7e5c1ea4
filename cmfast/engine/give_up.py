"""Give up a network's weights as they are packed, so that both are never there in full."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .graph import CONV, Graph, storage


def giver_up(module: nn.Module, graph: Graph) -> Callable[[str], None]:
    """What takes the name of a tensor of the graph, and frees its memory: all views of it, and the module's parameter.

    In their place are tensors without data; what torch reads at every call stays. Matrices that only other tensors were
    made of are freed at once; rows, such as biases, stay.
    """
    views: dict[int, list[str]] = defaultdict(list)
    for name, tensor in graph.tensors.items():
        views[storage(tensor)].append(name)

    def give_up(name: str) -> None:
        if storage(graph.tensors[name]) in wanted:
            return
        for view in views[storage(graph.tensors[name])]:
            graph.tensors[view] = _without_data(graph.tensors[view])
            owner, _, parameter = view.rpartition(".")
            if view in parameters:
                empty = nn.Parameter(_without_data(parameters.pop(view)), requires_grad=False)
                for asked in ("__deepcopy__", "__reduce_ex__"):
                    setattr(empty, asked, _refuse_copies)
                setattr(module.get_submodule(owner), parameter, empty)

    parameters = dict(module.named_parameters())
    attributes = [n for n in graph.nodes.nodes if n.op == "get_attr"]
    wanted = {  # by what is no convolution, at every call
        storage(graph.tensors[str(n.target)]) for n in attributes if any(user.target is not CONV for user in n.users)
    }
    read = {storage(graph.tensors[str(n.target)]) for n in attributes}
    for names in (views[memory] for memory in views.keys() - read):
        if graph.tensors[names[0]].ndim > 1:
            give_up(names[0])
    return give_up


def _refuse_copies(_: Any) -> Any:
    """What copies and pickles ask of a tensor without data, with which torch's layers would compute without a word."""
    raise RuntimeError("a model that has given up its weights (keep_weights=False) cannot be copied or pickled")


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
