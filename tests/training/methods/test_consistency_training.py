"""Consistency training against algorithm 3 of Song et al. 2023 in Python's floats."""

import math

import pytest
import torch

from cmfast.preconditioning import EDM, Consistency
from cmfast.training.methods.consistency_training import ConsistencyTraining, ConsistencyTrainingSettings

from .toy import IMAGES, LABELS, NOISE, UNIFORMS, WEIGHTS, Given, consistency, karras, losses, model

TARGET = (0.5, 0.8, 0.02)


@pytest.mark.parametrize(("iteration", "steps"), [(0, 2), (1, 4), (3, 5)])
@pytest.mark.parametrize("loss", ["pseudo-huber", "l2"])
def test_loss_is_that_of_the_paper(iteration, steps, loss):
    settings = ConsistencyTrainingSettings(last_steps=4, loss=loss, huber_c=0.1)
    method, draws = ConsistencyTraining(model(Consistency()), settings, 4), Given()
    with torch.no_grad():
        method.target.unet.w.copy_(torch.tensor(TARGET, dtype=torch.float64))
    expected = []
    for row, noise, u, label in zip(IMAGES, NOISE, UNIFORMS, LABELS, strict=True):
        n = math.floor(u * (steps - 1))
        low, high = karras(n, steps), karras(n + 1, steps)
        squares = sum(
            (consistency(x0 + high * z, high, label) - consistency(x0 + low * z, low, label, TARGET)) ** 2
            for x0, z in zip(row, noise, strict=True)
        )
        expected.append(squares / 4 if loss == "l2" else math.sqrt(squares + 0.2**2) - 0.2)
    assert losses(method, iteration, draws) == pytest.approx(expected, rel=1e-9)
    assert draws.calls == [("uniform", 3), ("normal", 3, 1, 2, 2)]


def test_the_target_follows_with_the_decay_of_the_update():
    """Update k, counted from 0, had N(k) levels: mu is 0.6^(2 / N(k))."""
    settings = ConsistencyTrainingSettings(last_steps=4, first_target_decay=0.6)
    method = ConsistencyTraining(model(Consistency()), settings, 4)
    expected = list(TARGET)
    with torch.no_grad():
        method.target.unet.w.copy_(torch.tensor(TARGET, dtype=torch.float64))
    for made, steps in enumerate((2, 4, 4, 5), 1):
        method.updated(made)
        decay = 0.6 ** (2 / steps)
        expected = [decay * t + (1 - decay) * w for t, w in zip(expected, WEIGHTS, strict=True)]
        assert method.target.unet.w.tolist() == pytest.approx(expected, rel=1e-6)
    assert method.networks() == {"target": method.target}


def test_student_is_a_consistency_model():
    assert ConsistencyTraining.student(model(EDM(sigma_max=20.0))).preconditioning == Consistency(sigma_max=20.0)
    assert ConsistencyTraining.student(model(Consistency())).preconditioning == Consistency()


def test_errors():
    with pytest.raises(ValueError, match="expected the preconditioning Consistency, got EDM"):
        ConsistencyTraining(model(EDM()), ConsistencyTrainingSettings(), 1)
    for wrong in ({"first_steps": 1}, {"last_steps": 1}, {"first_target_decay": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ConsistencyTrainingSettings(**wrong)
