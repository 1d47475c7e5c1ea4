"""The CPU as a target of the engine: packed weights, forms and programs of one network."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import fx, nn

from ...kernels import native
from ...kernels.conv_forms import ConvForm
from ..give_up import giver_up
from ..graph import CONV, Graph, arguments
from ..lower import lower
from .cache import Stored, fingerprint, write
from .executable import Executable
from .forms import attention_products, choose, images
from .served import kernels
from .tuning import Tuner
from .weights import Weights


class CpuTarget:
    """Compiles the graphs of one network to programs of csrc/cpu's kernels; they share its packed weights.

    Attributes:
        weights: of the convolutions and linear layers, as they have been packed so far.
    """

    device = torch.device("cpu")
    passes: Mapping[str, Callable[[Graph], int]] = {}
    backends: tuple[str, ...] = ("cpu",)
    replays: None = None

    def __init__(self, products: torch.dtype, *, tune: bool, cache: Path | None, keep_weights: bool) -> None:
        """See `cmfast.accelerate` for the arguments; `products` is the dtype of the operands of products.

        Raises ImportError where the CPU kernels were not built.
        """
        native.cpu()
        self.weights = Weights()
        self._products, self._cache, self._keep_weights = products, cache, keep_weights
        self._choose: Callable[[fx.Node], ConvForm] = functools.partial(choose, products=products)
        if tune:
            self._choose = Tuner(products, None if cache is None else cache / "forms.json")
        self._stored: Stored | None = None

    @property
    def bytes(self) -> int:
        """Size of the packed weights."""
        return sum(t.nbytes for t in self.weights.packed.values())

    def compile(
        self, network: nn.Module, graph: Graph, rewrites: Mapping[str, int], backend: str = "auto"
    ) -> Executable:
        """Pack the weights that the graph reads and no earlier one did, and make its program."""
        if self._cache is not None and self._stored is None:
            self._stored = Stored(self._cache / f"{self._fingerprint(network, graph)}.safetensors")
        done = (lambda name: None) if self._keep_weights else giver_up(network, graph)
        if self.weights.prepare(graph, self._choose, self._stored, done) and self._stored is not None:
            there = Stored(self._stored.path)  # as others have left it
            write(self._stored.path, {name: there.read(name) for name in there} | self.weights.packed)
        if isinstance(self._choose, Tuner):
            self._choose.save()
        steps = lower(graph, kernels(attention_products(self._products), images(self._products)))
        dtypes = [node.meta["val"].dtype for node in graph.nodes.output_node().args[0]]  # type: ignore[union-attr]
        return Executable(steps, rewrites, dtypes)

    def _fingerprint(self, network: nn.Module, graph: Graph) -> str:
        named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        packed = sorted({str(arguments(node)["weight"].target) for node in graph.calls(CONV)})
        return fingerprint(named, packed, self._products)
