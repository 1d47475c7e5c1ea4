"""The weights of a network's convolutions as the GPU kernels read them, packed once for all shapes of its inputs."""

import dataclasses
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, fx

from ..graph import CONV, Graph, arguments, change, value
from .served import available


@dataclasses.dataclass
class Weights:
    """Weights on the device, in the dtype of products, by the names of what was packed.

    Attributes:
        packed: those that the kernels read.
        converted: those of convolutions that torch serves.
    """

    packed: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    converted: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def prepare(
        self, graph: Graph, device: torch.device, dtype: torch.dtype, done: Callable[[str], None] = lambda name: None
    ) -> None:
        """Give every conv2d call of the graph its weights.

        `done` is called with the name of each tensor of the graph that is not read any more.

        Raises:
            RuntimeError: weights are to be packed that were given up.
        """
        for node in graph.calls(CONV):
            a = arguments(node)
            name, weight = str(a["weight"].target), graph.tensor(a["weight"])
            assert weight is not None
            change(node, dtype=dtype)
            if not _is_served(node, device, dtype):
                if name not in self.converted:
                    self.converted[name] = _there(name, weight).to(dtype)
                change(node, weight=graph.attribute(f"{name} in {dtype}", self.converted[name], node))
                continue
            if name not in self.packed:
                self.packed[name] = _pack(_there(name, weight), dtype)
            change(node, packed=graph.attribute(f"{name} packed", self.packed[name], node))
            done(name)


def _is_served(node: fx.Node, device: torch.device, dtype: torch.dtype) -> bool:
    a = arguments(node)
    tensors = [value(a[name]) for name in ("h", "skip", "weight", "residual") if a[name] is not None]
    return available("conv2d", device, [torch.empty_like(t, dtype=dtype) for t in tensors])[0]


def _there(name: str, weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise RuntimeError(f"{name} was given up (keep_weights=False): accelerate the whole model again")
    return weight


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    packed: Tensor = importlib.import_module("...kernels.triton.conv", __package__).pack(weight, dtype)
    return packed
