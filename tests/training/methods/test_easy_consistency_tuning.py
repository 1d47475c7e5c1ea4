"""Easy consistency tuning against Geng et al. 2024 in Python's floats."""

import math

import pytest
import torch

from cmfast.preconditioning import EDM, Consistency
from cmfast.training.methods.easy_consistency_tuning import EasyConsistencyTuning, EasyConsistencyTuningSettings

from .toy import IMAGES, LABELS, NOISE, NORMALS, Given, consistency, losses, model


def lower(t, stage, q=2.0, k=8.0, b=1.0):
    n = 1 + k / (1 + math.exp(b * t))
    return max(0.0, t * (1 - n / q ** (stage + 1)))


def by_hand(stage, mean, std, c, **mapping):
    expected = []
    for row, noise, normal, label in zip(IMAGES, NOISE, NORMALS, LABELS, strict=True):
        t = max(math.exp(mean + std * normal), 0.002)
        r = lower(t, stage, **mapping)
        squares = 0.0
        for x0, z in zip(row, noise, strict=True):
            wanted = x0 if r < 0.002 else consistency(x0 + r * z, r, label)
            squares += (consistency(x0 + t * z, t, label) - wanted) ** 2
        expected.append((math.sqrt(squares + c**2) - c) / (t - r))
    return expected


@pytest.mark.parametrize(("iteration", "stage"), [(0, 0), (12, 0), (13, 1), (50, 4), (99, 7)])
def test_loss_is_that_of_the_paper(iteration, stage):
    """100 updates are 8 stages of 12.5."""
    method, draws = EasyConsistencyTuning(model(Consistency()), EasyConsistencyTuningSettings(), 100), Given()
    assert losses(method, iteration, draws) == pytest.approx(by_hand(stage, -1.1, 2.0, 0.00054 * 2), rel=1e-9)
    assert draws.calls == [("normal", 3), ("normal", 3, 1, 2, 2)]


def test_settings_are_those_of_the_mapping():
    settings = EasyConsistencyTuningSettings(log_sigma_mean=1.0, log_sigma_std=0.5, stages=2, q=4.0, k=3.0, b=0.7)
    method = EasyConsistencyTuning(model(Consistency()), settings, 10)
    assert losses(method, 9) == pytest.approx(by_hand(1, 1.0, 0.5, 0.00054 * 2, q=4.0, k=3.0, b=0.7), rel=1e-9)


def test_it_starts_as_a_diffusion_model():
    """At the levels that matter for it, the first stage has r = 0: the target is the clean sample."""
    t = torch.tensor([0.01, 0.5, 1.0])
    method = EasyConsistencyTuning(model(Consistency()), EasyConsistencyTuningSettings(), 100)
    assert method.lower(t, 0).tolist() == [0.0, 0.0, 0.0]
    later = method.lower(t, 99)
    assert ((later > 0.98 * t) & (later < t)).all()


def test_levels_below_sigma_min_are_finite():
    settings = EasyConsistencyTuningSettings(log_sigma_mean=-9.0, log_sigma_std=0.1)
    method = EasyConsistencyTuning(model(Consistency()), settings, 100)
    found = losses(method, 99)
    assert found == pytest.approx(by_hand(7, -9.0, 0.1, 0.00054 * 2), rel=1e-9)
    assert all(math.isfinite(v) for v in found)


def test_student_starts_from_the_diffusion_model():
    student = EasyConsistencyTuning.student(model(EDM()))
    assert student.preconditioning == Consistency()
    with pytest.raises(ValueError, match="expected the preconditioning Consistency, got EDM"):
        EasyConsistencyTuning(model(EDM()), EasyConsistencyTuningSettings(), 1)
    for wrong in ({"stages": 0}, {"q": 1.0}, {"k": -1.0}, {"log_sigma_std": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EasyConsistencyTuningSettings(**wrong)


def test_levels_stay_apart_in_the_last_stage():
    with pytest.raises(ValueError, match="q must be at most 2²³ to the power of 1 / stages"):
        EasyConsistencyTuningSettings(stages=60)
    EasyConsistencyTuningSettings(stages=11, q=4.0)
