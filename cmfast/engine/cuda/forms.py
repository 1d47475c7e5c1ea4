"""What may serve a call on a GPU: a backend, and for convolutions how it divides the work."""

import importlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

from ...kernels.conv_arguments import ConvArguments


class Form(NamedTuple):
    """A way to compute a call; its string tells it from all others in files of measurements.

    Attributes:
        backend: "triton", "cuda", or "torch" for cuDNN's convolution with what surrounds it in launches of its own.
        config: how the backend divides the work; None leaves that to its own rule.
    """

    backend: str
    config: Any = None

    def __str__(self) -> str:
        return self.backend if self.config is None else f"{self.backend} {self.config}"


class Choose(Protocol):
    """Which form serves a call, of those of the backends that may, the first of which does where nothing is known.

    Arguments are tensors without data, but for parameters of the network.
    """

    def __call__(self, a: ConvArguments, backends: Collection[str]) -> Form:
        """The form of a convolution."""

    def of_operator(self, op: str, arguments: Sequence[Any], backends: Collection[str]) -> Form:
        """The form of another operator's call: one of its backends."""


def candidates(a: ConvArguments, backends: Collection[str], arch: str) -> list[Form]:
    """The forms of these backends that a measurement may choose from, what each takes by its own rule first."""
    return [Form(backend, config) for backend in backends for config in _CONFIGS[backend](a, arch)]


def _of_triton(a: ConvArguments, arch: str) -> list[Any]:
    config = importlib.import_module("...kernels.triton.conv_config", __package__)
    plan = importlib.import_module("...kernels.triton.conv", __package__).plan_conv2d
    found: list[Any] = []
    shape = a.weight.shape
    packed = a.weight.new_empty(()).expand(math.prod(shape[1:]), shape[0])

    def choose(*problem: Any) -> Any:
        found.extend(config.candidates(*problem))
        return found[0]

    plan(a._replace(packed=packed), arch=arch, choose=choose)
    return found or [None]


#: backend: the configurations that it has for a call.
_CONFIGS: dict[str, Callable[[ConvArguments, str], list[Any]]] = {
    "triton": _of_triton,
    "cuda": lambda a, arch: [None],
    "torch": lambda a, arch: [None],
}
