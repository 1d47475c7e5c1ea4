"""The weights of a network's convolutions as each backend reads them, packed once for all shapes of its inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import conv_weights
from . import cudnn


class Weights:
    """Weights on the device, in the dtype of products.

    Attributes:
        of: each backend's, by the names of what was packed.
    """

    def __init__(self) -> None:
        self.of: dict[str, dict[str, Tensor]] = {backend: {} for backend in PACKINGS}

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return sum(t.nbytes for packed in self.of.values() for t in packed.values())

    def __call__(
        self, name: str, weight: Tensor, backend: str, dtype: torch.dtype, done: Callable[[str], None]
    ) -> Tensor:
        """The weights of this name as a backend reads them, packed where they have not been.

        `done` is called with the name: the tensor itself is not read any more.

        Raises:
            RuntimeError: weights are to be packed that were given up.
        """
        there = self.of[backend]
        if name not in there:
            if weight.is_meta:
                raise RuntimeError(f"{name} was given up (keep_weights=False): accelerate the whole model again")
            there[name] = pack(weight, dtype, backend)
        done(name)
        return there[name]

    def backends(self, name: str) -> list[str]:
        """Those for which weights of this name are packed."""
        return [backend for backend, packed in self.of.items() if name in packed]


def pack(weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The weights of a convolution as a backend reads them."""
    return PACKINGS[backend](weight, dtype)


#: backend: what packs weights for it.
PACKINGS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "triton": conv_weights.pack,
    "cuda": conv_weights.pack,
    "torch": cudnn.pack,
}
