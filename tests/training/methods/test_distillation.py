"""Consistency distillation against algorithm 2 of Song et al. 2023 in Python's floats."""

import math

import pytest
import torch

from cmfast.preconditioning import EDM, Consistency, TrigFlow
from cmfast.training.methods.distillation import Distillation, DistillationSettings

from .toy import (
    IMAGES,
    LABELS,
    NOISE,
    OTHER_WEIGHTS,
    UNIFORMS,
    WEIGHTS,
    Given,
    consistency,
    edm,
    karras,
    losses,
    model,
)

TARGET = (0.5, 0.8, 0.02)


def make(**settings):
    student = Distillation.student(model(EDM()))
    method = Distillation(student, DistillationSettings(**settings), 10, model(EDM(), OTHER_WEIGHTS))
    with torch.no_grad():
        method.target.unet.w.copy_(torch.tensor(TARGET, dtype=torch.float64))
    return method


def difference(x0, z, high, low, label, solver):
    """Lines 3 to 6 of algorithm 2, one element."""
    x = x0 + high * z
    slope = (x - edm(x, high, label, OTHER_WEIGHTS)) / high
    previous = x + (low - high) * slope
    if solver == "heun":
        slope_next = (previous - edm(previous, low, label, OTHER_WEIGHTS)) / low
        previous = x + (low - high) * (slope + slope_next) / 2
    return consistency(x, high, label, WEIGHTS) - consistency(previous, low, label, TARGET)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("loss", ["pseudo-huber", "l2"])
def test_loss_is_that_of_the_paper(solver, loss):
    method, draws = make(grid_steps=7, solver=solver, loss=loss, huber_c=0.1), Given()
    expected = []
    for row, noise, u, label in zip(IMAGES, NOISE, UNIFORMS, LABELS, strict=True):
        n = math.floor(u * 6)
        low, high = karras(n, 7), karras(n + 1, 7)
        squares = sum(difference(x0, z, high, low, label, solver) ** 2 for x0, z in zip(row, noise, strict=True))
        expected.append(squares / 4 if loss == "l2" else math.sqrt(squares + 0.2**2) - 0.2)
    assert losses(method, draws=draws) == pytest.approx(expected, rel=1e-9)
    assert draws.calls == [("uniform", 3), ("normal", 3, 1, 2, 2)]


def test_the_grid_is_matched_from_end_to_end():
    """Uniform numbers at both ends of [0, 1) take the lowest and the highest pair, in float32 too."""
    method, seen = make(grid_steps=150), []
    method.model.denoise = lambda x, sigma, labels: seen.append(sigma) or x
    draws = Given()
    draws.uniform = lambda like: torch.tensor([0.0, 0.5, 1 - 2**-24]).to(like)
    method.loss(torch.zeros(3, 1, 2, 2), torch.tensor(LABELS), draws, 0)
    assert seen[0].tolist() == pytest.approx([karras(1, 150), karras(75, 150), 80.0], rel=1e-6)


def test_levels_between_those_of_the_grid():
    """Positions p of the higher level, in [0, 1 + 1/6] and at most 1, and 1/6 below it, at least 0: uniform numbers."""
    method, seen = make(grid_steps=7, levels="continuous"), []
    method.model.denoise = lambda x, sigma, labels: seen.append(sigma) or x
    heun = method.teacher.denoise
    method.teacher.denoise = lambda x, sigma, labels: seen.append(sigma) or heun(x, sigma, labels)
    draws = Given()
    draws.uniform = lambda like: torch.tensor([0.1, 0.5, 0.9], dtype=like.dtype)
    method.loss(torch.zeros(3, 1, 2, 2).double(), torch.tensor(LABELS), draws, 0)
    at_high, at_low, high = seen
    positions = [0.1 * 7 / 6, 0.5 * 7 / 6, 1.0]  # 0.9 · 7/6 is more than 1
    assert high.tolist() == at_high.tolist() == pytest.approx([karras(6 * p, 7) for p in positions], rel=1e-9)
    assert at_low.tolist() == pytest.approx([0.002, karras(6 * positions[1] - 1, 7), karras(5, 7)], rel=1e-9)


def test_only_the_student_has_a_gradient():
    method = make()
    before = method.teacher.unet.w.clone()
    method.loss(torch.zeros(3, 1, 2, 2).double(), torch.tensor(LABELS), Given(), 0).sum().backward()
    assert method.model.unet.w.grad.abs().sum() > 0
    assert method.target.unet.w.grad is None
    assert method.teacher.unet.w.grad is None
    assert torch.equal(method.teacher.unet.w, before)
    assert list(method.parameters()) == [method.model.unet.w]


def test_the_target_follows():
    method = make(target_ema_decay=0.75)
    method.updated(1)
    expected = [0.75 * t + 0.25 * w for t, w in zip(TARGET, WEIGHTS, strict=True)]
    assert method.target.unet.w.tolist() == pytest.approx(expected, rel=1e-6)
    assert method.networks() == {"target": method.target}
    assert not method.target.training


def test_student_is_a_consistency_model():
    student = Distillation.student(model(EDM(sigma_data=0.7, sigma_max=20.0, num_train_timesteps=12)))
    assert student.preconditioning == Consistency(sigma_data=0.7, sigma_max=20.0, num_train_timesteps=12)
    assert student.sample(2, steps=2).shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match="expected the preconditioning EDM or Consistency, got TrigFlow"):
        Distillation.student(model(TrigFlow()))


def test_errors():
    with pytest.raises(ValueError, match="a diffusion model as teacher, got none"):
        Distillation(model(Consistency()), DistillationSettings(), 1)
    with pytest.raises(ValueError, match="teacher: expected the preconditioning EDM, got Consistency"):
        Distillation(model(Consistency()), DistillationSettings(), 1, model(Consistency()))
    with pytest.raises(ValueError, match="student: expected the preconditioning Consistency, got EDM"):
        Distillation(model(EDM()), DistillationSettings(), 1, model(EDM()))
    for wrong in ({"grid_steps": 1}, {"levels": "all"}, {"solver": "dpm"}, {"target_ema_decay": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DistillationSettings(**wrong)
    with pytest.raises(ValueError, match="unknown loss"):
        make(loss="l1")
