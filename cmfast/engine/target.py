"""What a device must offer for the engine to run networks on it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from .graph import Graph
from .steps import Steps, Timed

if TYPE_CHECKING:
    from .cuda.replay import Replays


class Executable(Protocol):
    """A graph ready to run, at one shape of its inputs.

    Attributes:
        steps: what it does, in order.
        rewrites: how many times each pass rewrote the graph.
        bytes: size of the memory of all its values.
        dtypes: those in which the outputs are computed.
    """

    steps: Steps
    rewrites: dict[str, int]
    bytes: int

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those in which the outputs are computed."""

    def __call__(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
        """Evaluate the graph; the outputs have the given dtypes, by default those in which they are computed."""

    def time(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> Timed:
        """Evaluate the graph in the same way, and take the time of each step."""


class Target(Protocol):
    """A device that runs the graphs of one network, each for other inputs: they share what was made of its weights.

    Attributes:
        device: where the network's inputs must be.
        passes: those that run after the passes for every target, by their names.
        backends: those of its kernels that may be asked for by name.
        bytes: size of the packed weights.
    """

    device: torch.device
    passes: Mapping[str, Callable[[Graph], int]]
    backends: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of the packed weights."""

    @property
    def replays(self) -> "Replays | None":
        """What calls the network several times, captured as a whole; None where nothing is captured."""

    def compile(
        self, network: nn.Module, graph: Graph, rewrites: Mapping[str, int], backend: str = "auto"
    ) -> Executable:
        """Make what evaluates a graph of the network, after the passes have rewritten it.

        Raises:
            BackendError: a backend other than "auto" cannot serve an operator that the target's kernels have.
        """
