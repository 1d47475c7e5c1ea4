"""What a way of training is, to the loop that runs it: one file of this folder each."""

import abc
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

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
        needs_teacher: a diffusion model has to be given to learn from.
        model: the model that is trained, in place; `student` makes one of the right kind.
        iterations: updates of the whole run, which the paper's schedules are stretched over.
    """

    needs_teacher: ClassVar[bool] = False
    model: ConsistencyModel
    iterations: int

    def __init__(
        self, model: ConsistencyModel, settings: Any, iterations: int, teacher: ConsistencyModel | None = None
    ) -> None:
        """Take the model, the method's own settings, the length of the run, and the teacher where one is needed.

        Raises:
            ValueError: no updates, a teacher that is missing or not wanted, or a preconditioning that does not fit.
        """
        name = type(self).__name__
        if iterations < 1:
            raise ValueError(f"{name}: expected at least one iteration, got {iterations}")
        if (teacher is None) == self.needs_teacher:
            wanted = "a diffusion model as teacher, got none" if self.needs_teacher else "no teacher, got one"
            raise ValueError(f"{name}: expected {wanted}")
        self.model, self.iterations = model, iterations

    @classmethod
    @abc.abstractmethod
    def student(cls, source: ConsistencyModel) -> ConsistencyModel:
        """A model for this method to train, with a copy of the weights of `source` and the preconditioning it needs.

        Args:
            source: the teacher, a diffusion model to start from, or a freshly initialised one.

        Raises:
            ValueError: a preconditioning whose network this method has no use for.
        """

    @abc.abstractmethod
    def loss(self, images: Tensor, labels: Tensor | None, draws: Draws, iteration: int) -> Tensor:
        """The loss of each sample [N], whose mean over the whole batch is minimised.

        Args:
            images: clean samples [N, C, *spatial] in [-1, 1].
            labels: their classes [N], int64; None for an unconditional model.
            draws: gives the random numbers.
            iteration: updates made before this one.
        """

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer moves: the model's parameters, and those of the method's own networks that learn."""
        return self.model.parameters()

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
