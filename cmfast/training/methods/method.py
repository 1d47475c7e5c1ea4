"""What a way of training is, to the loop that runs it: one file of this folder each."""

import abc
from typing import Any, Protocol

from torch import Tensor, nn

from ...model import ConsistencyModel


class Draws(Protocol):
    """The random numbers of one update, for the samples that are at hand.

    They are drawn for the update's whole batch, and each process and each part of an accumulated batch takes those of
    its samples: so that the numbers of a sample do not depend on how the batch is divided. Calls are made in the same
    order in each part.
    """

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of `like` [N, ...]."""

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1), as `normal`."""


class Method(abc.ABC):
    """One way of training: what a batch costs, and what happens after an update.

    Attributes:
        model: the model that is trained, in place.
    """

    model: ConsistencyModel

    @abc.abstractmethod
    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The loss of each sample [N], whose mean over the whole batch is minimised.

        Args:
            images: clean samples [N, C, *spatial] in [-1, 1].
            labels: their classes [N], int64; None for an unconditional model.
            draws: gives the random numbers.
            iteration: updates made before this one.
        """

    def updated(self, iteration: int) -> None:  # noqa: B027
        """Called after each update with the number of updates made; a target network follows here."""

    def networks(self) -> dict[str, nn.Module]:
        """What else has to be stored with the model's weights to go on from here, such as a target network."""
        return {}

    def state(self) -> dict[str, Any]:
        """Numbers that have to be stored as well, as JSON can hold them."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no numbers, and was given {', '.join(state)}")
