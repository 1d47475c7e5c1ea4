"""A GPU as a target of the engine: weights on the device, and launches for the graphs of one network."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from ...kernels.triton.launch import architecture
from ..give_up import giver_up
from ..graph import Graph
from ..lower import lower
from ..passes import GPU_PASSES
from .convolutions import Convolutions
from .executable import Executable
from .forms import Choose
from .measurements import shipped
from .replay import Replays
from .rule import Rule
from .served import kernels
from .tuning import Tuner
from .weights import Weights


class GpuTarget:
    """Compiles the graphs of one network to launches of the GPU kernels; they share its packed weights.

    The device may be the CPU, where Triton's interpreter takes the launches.

    Attributes:
        device: that of the network's parameters.
        dtype: in which kernels hold images and take products; sums are float32.
        passes: those that run after the passes for every target, by their names.
        backends: those that may be asked for by name.
        choose: which form serves a convolution.
        weights: of the convolutions and linear layers, as they have been packed so far.
        replays: of what calls the network several times; None without CUDA graphs.
    """

    backends: tuple[str, ...] = ("cuda", "triton")

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        graphs: bool,
        keep_weights: bool,
        tune: bool = False,
        cache: Path | None = None,
    ) -> None:
        """Take a device; `graphs` says whether evaluations are captured in CUDA graphs. See `cmfast.accelerate`."""
        self.device, self.dtype = device, dtype
        self.passes: Mapping[str, Callable[[Graph], int]] = GPU_PASSES
        self.weights = Weights()
        self.replays: Replays | None = Replays(device) if graphs else None
        self._graphs, self._keep_weights = graphs, keep_weights
        self._arch = architecture(device)
        self.choose: Choose = Tuner(device, self._arch, cache) if tune else Rule(self._arch, shipped(device))

    @property
    def bytes(self) -> int:
        """Size of the packed weights."""
        return self.weights.bytes

    def compile(
        self, network: nn.Module, graph: Graph, rewrites: Mapping[str, int], backend: str = "auto"
    ) -> Executable:
        """Pack the weights that the graph reads and no earlier one did, and make its launches, by a backend or any.

        What is packed and cleared is there when it returns: calls may be on any stream.
        """
        if self.device.type != "cuda":
            return self._compile(network, graph, rewrites, backend)
        with torch.cuda.device(self.device):
            made = self._compile(network, graph, rewrites, backend)
            torch.cuda.current_stream().synchronize()
        return made

    def _compile(self, network: nn.Module, graph: Graph, rewrites: Mapping[str, int], backend: str) -> Executable:
        done = (lambda name: None) if self._keep_weights else giver_up(network, graph)
        weights = functools.partial(self.weights, dtype=self.dtype, done=done)
        convolutions = Convolutions(
            self.device, self.dtype, self._arch, weights, self.choose, packed_for=self.weights.backends
        )
        steps = lower(graph, kernels(self.device, self.dtype, self._arch, convolutions, backend))
        dtypes = [node.meta["val"].dtype for node in graph.nodes.output_node().args[0]]  # type: ignore[union-attr]
        return Executable(steps, rewrites, dtypes, self.device, graphs=self._graphs)
