"""The denoising losses against the papers' formulas in Python's floats."""

import math

import pytest
import torch

from cmfast.preconditioning import EDM, Consistency, Flow, LatentConsistency, TrigFlow
from cmfast.training.methods.diffusion import Diffusion, DiffusionSettings
from cmfast.training.methods.levels import noised

from .toy import IMAGES, LABELS, NOISE, NORMALS, UNIFORMS, Given, edm, images, karras, losses, model, toy


def by_hand(loss_of_element, levels):
    """The mean over the elements of each sample."""
    return [
        sum(loss_of_element(x0, z, level, label) for x0, z in zip(row, noise, strict=True)) / 4
        for row, noise, level, label in zip(IMAGES, NOISE, levels, LABELS, strict=True)
    ]


def edm_loss(x0, z, sigma, label):
    """Karras et al. 2022, equation 2 with λ of table 1."""
    return (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (edm(x0 + sigma * z, sigma, label) - x0) ** 2


def trigflow_loss(x0, z, sigma, label):
    """Lu and Song 2024, section 3: the network times sigma_data estimates the velocity."""
    t = math.atan(sigma / 0.5)
    x = math.cos(t) * x0 + math.sin(t) * 0.5 * z
    return (toy(x / 0.5, t, label) - (math.cos(t) * 0.5 * z - math.sin(t) * x0) / 0.5) ** 2


def flow_loss(x0, z, sigma, label):
    """Liu et al. 2022, equation 1."""
    return (toy((1 - sigma) * x0 + sigma * z, 1000 * sigma, label) - (z - x0)) ** 2


LEVELS = [math.exp(-1.2 + 1.2 * n) for n in NORMALS]


@pytest.mark.parametrize(
    ("preconditioning", "loss", "levels"),
    [
        (EDM(), edm_loss, LEVELS),
        (TrigFlow(), trigflow_loss, LEVELS),
        (TrigFlow(network="edm"), edm_loss, LEVELS),
        (Flow(), flow_loss, [1 / (1 + math.exp(1.2 - 1.2 * n)) for n in NORMALS]),
    ],
    ids=["edm", "trigflow", "trigflow-edm", "flow"],
)
def test_losses_are_those_of_the_papers(preconditioning, loss, levels):
    method, draws = Diffusion(model(preconditioning), DiffusionSettings(), 10), Given()
    assert losses(method, draws=draws) == pytest.approx(by_hand(loss, levels), rel=1e-9)
    assert draws.calls == [("normal", 3), ("normal", 3, 1, 2, 2)]


def test_a_share_of_the_levels_is_spread_over_the_grid():
    """The first two uniform numbers are below the share: their levels lie 1 - u / share up the Karras grid."""
    settings = DiffusionSettings(log_sigma_mean=0.3, log_sigma_std=0.5, uniform_share=0.8)
    spread = [karras(1 - u / 0.8, 2) for u in UNIFORMS[:2]]
    levels = [*spread, math.exp(0.3 + 0.5 * NORMALS[2])]
    assert spread[0] > 50
    method = Diffusion(model(EDM()), settings, 10)
    assert losses(method) == pytest.approx(by_hand(edm_loss, levels), rel=1e-9)
    levels = [1 - u / 0.8 for u in UNIFORMS[:2]] + [1 / (1 + math.exp(-0.3 - 0.5 * NORMALS[2]))]
    method = Diffusion(model(Flow()), settings, 10)
    assert losses(method) == pytest.approx(by_hand(flow_loss, levels), rel=1e-9)


def test_samples_are_those_that_renoise_makes():
    sigma = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    noise = torch.tensor(NOISE, dtype=torch.float64).reshape(3, 1, 2, 2)
    for p in (EDM(), TrigFlow(), Flow()):
        found = noised(p, images(), sigma, noise)
        for i, level in enumerate(sigma.tolist()):
            alpha, beta = p.renoise(level)
            torch.testing.assert_close(found[i], alpha * images()[i] + beta * noise[i])
    with pytest.raises(ValueError, match="LatentConsistency"):
        noised(LatentConsistency(), images(), sigma, noise)


def test_student_is_a_copy():
    source = model(TrigFlow(sigma_data=0.7))
    student = Diffusion.student(source)
    assert student.preconditioning == source.preconditioning
    assert student.unet.w is not source.unet.w
    assert torch.equal(student.unet.w, source.unet.w)
    assert student.unet.w.requires_grad
    assert (student.sample_shape, student.num_classes) == ((1, 2, 2), 2)


def test_errors():
    with pytest.raises(ValueError, match="expected the preconditioning EDM or TrigFlow or Flow, got Consistency"):
        Diffusion(model(Consistency()), DiffusionSettings(), 1)
    with pytest.raises(ValueError, match="at least one iteration, got 0"):
        Diffusion(model(EDM()), DiffusionSettings(), 0)
    with pytest.raises(ValueError, match="no teacher, got one"):
        Diffusion(model(EDM()), DiffusionSettings(), 1, teacher=model(EDM()))
    with pytest.raises(ValueError, match=r"uniform_share must be in \[0, 1\], got 1.5"):
        DiffusionSettings(uniform_share=1.5)
    with pytest.raises(ValueError, match="keeps no numbers"):
        Diffusion(model(EDM()), DiffusionSettings(), 1).load_state({"a": 1})
