"""What all trainings share: the averaged weights, the learning rate's decay and the loop."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy of the model to hold averaged weights, without gradients, in evaluation mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def average_into(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Average ← decay · average + (1 - decay) · model, for every parameter."""
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [m.detach() for _, m in pairs], 1.0 - decay)


class RunningAverage:
    """Averaged weights that forget their start: update u counts for at least 10 / (u + 10)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = averaged_copy(model), decay, 0

    def update(self, model: nn.Module) -> None:
        """Take in the model's weights."""
        self.updates += 1
        average_into(self.model, model, min(self.decay, self.updates / (self.updates + 10)))


def optimize(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    iterations: int,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[float], float],
    clip: float | None,
    after_step: Callable[[], None],
    progress: Callable[[int, float], None] | None,
) -> None:
    """Run the training loop.

    Args:
        model: in training mode; its parameters are those of the optimizer.
        loss: draws a batch and returns its mean loss.
        iterations: how many updates.
        optimizer: over the model's parameters.
        schedule: factor of the learning rate after the fraction of training in [0, 1).
        clip: bound of the gradient's norm; None does not clip.
        after_step: called after each update.
        progress: called with (iteration, loss) after each update.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i / iterations))
    for iteration in range(iterations):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        after_step()
        if progress is not None:
            progress(iteration, value.item())
