"""Where the time of a whole batch of samples goes: evaluations of the network, the sampler's steps, noise."""

import dataclasses
from collections.abc import Iterable

from torch import Tensor

from ..model import ConsistencyModel
from ..modes import in_eval_mode
from ..noise import GaussianNoise
from .measurement import Measured, measure
from .recording import Operation

#: The stages of a sampling run beside the evaluations of the network, which are counted from 1.
NOISE, SAMPLER = "noise", "sampler"


def measure_sampling(
    model: ConsistencyModel,
    count: int,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    rounds: int | None = None,
) -> Measured:
    """Measure `model.sample(count, sampler=sampler, steps=steps)`; see `ConsistencyModel.sample`.

    The operations have a stage each: "evaluation 1" and so on, "noise", or "sampler": what scales and steps, with the
    noise that is drawn in the same launch. On a GPU what is recorded runs step by step, also where the call that is
    timed as a whole is the replay of one CUDA graph.

    Raises:
        ValueError: an unknown sampler, or a number of steps that it does not take.
    """
    function, levels = model._plan(sampler, steps, None, None, None)
    labels, noise = model._labels(None, count, 0), _NotedNoise(0)
    with in_eval_mode(model):
        measured = measure(
            lambda: model.sample(count, sampler=sampler, steps=steps),
            {module: name for name, module in model.named_modules()},
            model.device,
            rounds,
            recorded=lambda: model._sample_batch(function, levels, count, noise, labels),
            stage=lambda: NOISE if noise.drawing else SAMPLER,
        )
    _count_evaluations(measured.recording.operations)
    return measured


def _count_evaluations(operations: Iterable[Operation]) -> None:
    """Give what runs in the network its stage: between two evaluations, the sampler always does something."""
    count, inside = 0, False
    for operation in operations:
        before, inside = inside, operation.layer.split(".")[0] == "unet"
        count += inside and not before
        if inside:
            operation.stage = f"evaluation {count}"


@dataclasses.dataclass(frozen=True)
class _NotedNoise(GaussianNoise):
    """Noise that notes when it is drawn: `drawing` has the number of the draw then, and is empty otherwise."""

    drawing: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, like: Tensor, draw: int) -> Tensor:
        self.drawing.append(draw)
        try:
            return super().__call__(like, draw)
        finally:
            self.drawing.pop()
