"""Progressive distillation against algorithm 2 of Salimans and Ho 2022 in Python's floats."""

import math

import pytest
import torch

from cmfast.preconditioning import EDM, Consistency
from cmfast.training.methods.progressive_distillation import ProgressiveDistillation, ProgressiveDistillationSettings

from .toy import IMAGES, LABELS, NOISE, OTHER_WEIGHTS, UNIFORMS, WEIGHTS, Given, edm, karras, losses, model


def make(iterations=30, **settings):
    settings = ProgressiveDistillationSettings(**{"first_steps": 4, "last_steps": 1} | settings)
    student = ProgressiveDistillation.student(model(EDM()))
    return ProgressiveDistillation(student, settings, iterations, model(EDM(), OTHER_WEIGHTS))


def target(x, high, middle, low, label):
    """Two DDIM steps with the teacher, and the estimate with which one step would go as far (α = 1)."""
    reached = x
    for here, there in ((high, middle), (middle, low)):
        denoised = edm(reached, here, label, OTHER_WEIGHTS)
        reached = denoised + there / here * (reached - denoised)
    return (reached - low / high * x) / (1 - low / high)


@pytest.mark.parametrize(("iteration", "steps"), [(0, 4), (9, 4), (10, 2), (29, 1)])
def test_loss_is_that_of_the_paper(iteration, steps):
    method, draws = make(), Given()
    expected = []
    for row, noise, u, label in zip(IMAGES, NOISE, UNIFORMS, LABELS, strict=True):
        i = 2 * math.floor(u * steps)
        high, middle, low = (karras(2 * steps - i - further, 2 * steps + 1) for further in range(3))
        squares = 0.0
        for x0, z in zip(row, noise, strict=True):
            x = x0 + high * z
            squares += (edm(x, high, label) - target(x, high, middle, low, label)) ** 2
        expected.append(max(1 / high**2, 1.0) * squares / 4)
    assert losses(method, iteration, draws) == pytest.approx(expected, rel=1e-9)
    assert draws.calls == [("uniform", 3), ("normal", 3, 1, 2, 2)]


def test_a_step_of_the_sampler_with_the_target_ends_where_two_of_the_teacher_do():
    """Of what `sample_progdist` does with four steps, the first, and the two of a teacher with eight."""
    levels, label, x = EDM().grid(9), 1, 70.0
    high, middle, low = levels[:3]
    wanted = target(x, high, middle, low, label)
    halfway = x + (middle - high) * (x - edm(x, high, label, OTHER_WEIGHTS)) / high
    reached = halfway + (low - middle) * (halfway - edm(halfway, middle, label, OTHER_WEIGHTS)) / middle
    assert x + (low - high) * (x - wanted) / high == pytest.approx(reached)
    assert EDM().grid(5)[:2] == pytest.approx([high, low])


def test_the_student_becomes_the_teacher():
    method = make()
    given = method.teacher.unet.w.tolist()
    for made in range(1, 31):
        with torch.no_grad():
            method.model.unet.w.fill_(made)
        method.updated(made)
        expected = given if made < 10 else [10.0] * 3 if made < 20 else [20.0] * 3
        assert method.teacher.unet.w.tolist() == expected
    assert method.networks() == {"teacher": method.teacher}


def test_the_given_teacher_is_left_as_it_is():
    teacher = model(EDM(), OTHER_WEIGHTS)
    method = ProgressiveDistillation(model(EDM()), ProgressiveDistillationSettings(), 5, teacher)
    method.updated(1)
    assert method.teacher.unet.w.tolist() == pytest.approx(WEIGHTS)
    assert teacher.unet.w.tolist() == pytest.approx(OTHER_WEIGHTS)


def test_errors():
    assert [ProgressiveDistillationSettings(a, b).stages for a, b in ((1, 1), (2, 1), (16, 1), (12, 3))] == [1, 2, 5, 3]
    for first, last in ((3, 1), (1, 2), (4, 0)):
        with pytest.raises(ValueError, match="_steps must be"):
            ProgressiveDistillationSettings(first_steps=first, last_steps=last)
    with pytest.raises(ValueError, match="3 stages need as many iterations at least, got 2"):
        make(iterations=2)
    with pytest.raises(ValueError, match="teacher: expected the preconditioning EDM, got Consistency"):
        ProgressiveDistillation(model(EDM()), ProgressiveDistillationSettings(), 9, model(Consistency()))
    with pytest.raises(ValueError, match="student: expected the preconditioning EDM, got Consistency"):
        ProgressiveDistillation(model(Consistency()), ProgressiveDistillationSettings(), 9, model(EDM()))
