"""Improved consistency training against Song and Dhariwal 2023 in Python's floats."""

import math

import pytest
import torch

from cmfast.preconditioning import EDM, Consistency
from cmfast.training.methods.improved_consistency_training import (
    ImprovedConsistencyTraining,
    ImprovedConsistencyTrainingSettings,
)

from .toy import IMAGES, LABELS, NOISE, UNIFORMS, Given, consistency, karras, losses, model


def index(u, steps):
    areas = [math.erf((math.log(karras(i, steps)) + 1.1) / (math.sqrt(2) * 2)) for i in range(steps)]
    return next(i for i in range(steps - 1) if u < (areas[i + 1] - areas[0]) / (areas[-1] - areas[0]))


@pytest.mark.parametrize(("iteration", "steps"), [(0, 11), (100, 21), (799, 1281)])
def test_loss_is_that_of_the_paper(iteration, steps):
    method = ImprovedConsistencyTraining(model(Consistency()), ImprovedConsistencyTrainingSettings(), 800)
    draws, c, expected = Given(), 0.00054 * 2, []
    for row, noise, u, label in zip(IMAGES, NOISE, UNIFORMS, LABELS, strict=True):
        i = index(u, steps)
        low, high = karras(i, steps), karras(i + 1, steps)
        squares = sum(
            (consistency(x0 + high * z, high, label) - consistency(x0 + low * z, low, label)) ** 2
            for x0, z in zip(row, noise, strict=True)
        )
        expected.append((math.sqrt(squares + c**2) - c) / (high - low))
    assert losses(method, iteration, draws) == pytest.approx(expected, rel=1e-7)
    assert draws.calls == [("uniform", 3), ("normal", 3, 1, 2, 2)]


def test_the_target_has_no_gradient():
    """The derivative is that of the upper neighbour alone: of a number that does not depend on the weights."""
    method = ImprovedConsistencyTraining(model(Consistency()), ImprovedConsistencyTrainingSettings(loss="l2"), 800)
    evaluated, denoise = [], method.model.denoise

    def recorded(x, sigma, labels):
        evaluated.append((denoise(x, sigma, labels), sigma))
        return evaluated[-1][0]

    method.model.denoise = recorded
    loss = method.loss(torch.tensor(IMAGES).double().reshape(3, 1, 2, 2), torch.tensor(LABELS), Given(), 0)
    (wanted, low), (denoised, high) = evaluated
    assert not wanted.requires_grad
    assert (low < high).all()
    (found,) = torch.autograd.grad(loss.sum(), method.model.unet.w, retain_graph=True)
    slope = 2 * (denoised - wanted).detach() / 4 / (high - low).reshape(3, 1, 1, 1)
    (expected,) = torch.autograd.grad(denoised, method.model.unet.w, slope)
    torch.testing.assert_close(found, expected)


def test_errors():
    with pytest.raises(ValueError, match="expected the preconditioning Consistency, got EDM"):
        ImprovedConsistencyTraining(model(EDM()), ImprovedConsistencyTrainingSettings(), 1)
    for wrong in ({"first_steps": 0}, {"last_steps": 9}, {"log_sigma_std": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ImprovedConsistencyTrainingSettings(**wrong)
    assert ImprovedConsistencyTraining.student(model(EDM())).preconditioning == Consistency()
