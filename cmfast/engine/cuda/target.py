"""A GPU as a target of the engine: weights on the device, and launches for the graphs of one network."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ...kernels.triton.launch import architecture
from ..give_up import giver_up
from ..graph import Graph
from ..lower import lower
from ..passes import GPU_PASSES
from .executable import Executable
from .replay import Replays
from .served import kernels
from .weights import Weights


class GpuTarget:
    """Compiles the graphs of one network to launches of the Triton kernels; they share its packed weights.

    The device may be the CPU, where Triton's interpreter takes the launches.

    Attributes:
        device: that of the network's parameters.
        dtype: in which kernels hold images and take products; sums are float32.
        passes: those that run after the passes for every target, by their names.
        weights: of the convolutions and linear layers, as they have been packed so far.
        replays: of what calls the network several times; None without CUDA graphs.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, graphs: bool, keep_weights: bool) -> None:
        """Take a device; `graphs` says whether evaluations are captured in CUDA graphs. See `cmfast.accelerate`."""
        self.device, self.dtype = device, dtype
        self.passes: Mapping[str, Callable[[Graph], int]] = GPU_PASSES
        self.weights = Weights()
        self.replays: Replays | None = Replays(device) if graphs else None
        self._graphs, self._keep_weights = graphs, keep_weights

    @property
    def bytes(self) -> int:
        """Size of the packed weights."""
        return sum(t.nbytes for t in (*self.weights.packed.values(), *self.weights.converted.values()))

    def compile(self, network: nn.Module, graph: Graph, rewrites: Mapping[str, int]) -> Executable:
        """Pack the weights that the graph reads and no earlier one did, and make its launches."""
        done = (lambda name: None) if self._keep_weights else giver_up(network, graph)
        self.weights.prepare(graph, self.device, self.dtype, done)
        steps = lower(graph, kernels(self.device, self.dtype, architecture(self.device)))
        dtypes = [node.meta["val"].dtype for node in graph.nodes.output_node().args[0]]  # type: ignore[union-attr]
        return Executable(steps, rewrites, dtypes, self.device, graphs=self._graphs)
