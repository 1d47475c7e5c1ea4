"""What a service knows of its model, which another process has."""

import dataclasses
from collections.abc import Mapping

from torch import nn

from ..bulk.formats import is_picture
from ..model import ConsistencyModel, samplers_of
from ..preconditioning import Preconditioning


@dataclasses.dataclass(frozen=True)
class Description:
    """A model without its network: enough to read requests.

    Attributes:
        name: of the model, as clients see it.
        sample_shape: [C, *spatial] of one sample.
        num_classes: number of classes; None for an unconditional model.
        preconditioning: of the model.
        recommended_levels: by the number of steps.
        accelerated: whether the engine evaluates it.
        device: that it is on.
    """

    name: str
    sample_shape: tuple[int, ...]
    num_classes: int | None
    preconditioning: Preconditioning
    recommended_levels: Mapping[int, tuple[float, ...]]
    accelerated: bool
    device: str

    @property
    def is_picture(self) -> bool:
        """Whether a sample is an image that a PNG can hold."""
        return is_picture(self.sample_shape, "uint8")

    @property
    def is_visible(self) -> bool:
        """Whether a grid of samples can be drawn: images, and videos as rows of frames."""
        return len(self.sample_shape) in (3, 4) and self.sample_shape[0] in (1, 3)

    @property
    def size(self) -> str:
        """Width and height of an image, as the images endpoint writes it."""
        return f"{self.sample_shape[-1]}x{self.sample_shape[-2]}"

    @property
    def samplers(self) -> list[str]:
        """The samplers that suit the model."""
        return samplers_of(self.preconditioning)

    def planner(self) -> ConsistencyModel:
        """A model that checks labels and finds levels as the real one does, and cannot be evaluated."""
        return ConsistencyModel(
            nn.Linear(1, 1),  # on the CPU, where labels are checked
            self.preconditioning,
            sample_shape=self.sample_shape,
            num_classes=self.num_classes,
            recommended_levels=self.recommended_levels,
        )
