"""Continuous-time consistency training and distillation against algorithm 1 of Lu and Song 2024 in Python's floats."""

import math

import pytest
import torch

from cmfast import ConsistencyModel
from cmfast.preconditioning import EDM, Consistency, TrigFlow
from cmfast.training.methods.continuous_consistency import ContinuousConsistencySettings
from cmfast.training.methods.continuous_consistency_distillation import ContinuousConsistencyDistillation
from cmfast.training.methods.continuous_consistency_training import ContinuousConsistencyTraining
from cmfast.training.methods.targets import same_dropout
from cmfast.training.methods.weighting import AdaptiveWeighting

from ...fixture_files import tiny_unet
from .toy import (
    IMAGES,
    LABELS,
    NOISE,
    NORMALS,
    OTHER_WEIGHTS,
    WEIGHTS,
    Given,
    edm,
    images,
    labels,
    losses,
    model,
    toy,
)

COEFFICIENTS = [0.3, -0.2, 0.1]


def make(network, teacher=None, **settings):
    settings = ContinuousConsistencySettings(**settings)
    student = model(TrigFlow(network=network))
    if teacher is None:
        method = ContinuousConsistencyTraining(student, settings, 10)
    else:
        method = ContinuousConsistencyDistillation(student, settings, 10, teacher)
    with torch.no_grad():
        method.weighting.coefficients[:3] = torch.tensor(COEFFICIENTS)
    return method


def output(x, t, label, network, weights=WEIGHTS):
    """F(x, t) of TrigFlow, and its derivatives by x and by t."""
    time, by_t = (250 * math.log(0.5 * math.tan(t)), 250 / (math.sin(t) * math.cos(t))) if network == "edm" else (t, 1)
    sign = -1 if network == "edm" else 1
    value = sign * toy(x, time, label, weights)
    slope = weights[1] * math.cos(x + weights[2] * time)
    return value, sign * (weights[0] + slope), sign * slope * weights[2] * by_t


def by_hand(network, velocity, r, mean=-1.0, std=1.4, c=0.1):
    """The loss of each sample."""
    expected = []
    for row, noise, normal, label in zip(IMAGES, NOISE, NORMALS, LABELS, strict=True):
        t = math.atan(math.exp(mean + std * normal) / 0.5)
        tangents = []
        for x0, unit in zip(row, noise, strict=True):
            z = 0.5 * unit
            x = math.cos(t) * x0 + math.sin(t) * z
            dxdt = velocity(x, t, x0, z, label)
            f, by_x, by_t = output(x / 0.5, t, label, network)
            dfdt = by_x * dxdt / 0.5 + by_t
            tangent = -(math.cos(t) ** 2) * (0.5 * f - dxdt) - r * math.cos(t) * math.sin(t) * (x + 0.5 * dfdt)
            tangents.append(tangent)
        norm = math.sqrt(sum(g**2 for g in tangents))
        weight = sum(a * math.cos(2 * k * t) for k, a in enumerate(COEFFICIENTS))
        expected.append(math.exp(weight) * sum((g / (norm + c)) ** 2 for g in tangents) / 4 - weight)
    return expected


def of_the_line(x, t, x0, z, label):
    return math.cos(t) * z - math.sin(t) * x0


def of_a_trigflow_teacher(x, t, x0, z, label):
    return 0.5 * toy(x / 0.5, t, label, OTHER_WEIGHTS)


def of_an_edm_teacher(x, t, x0, z, label):
    """EDM's flow dx/dσ = (x - D) / σ for x / cos t, with σ = σ_data tan t."""
    sigma, scaled = 0.5 * math.tan(t), x / math.cos(t)
    slope = (scaled - edm(scaled, sigma, label, OTHER_WEIGHTS)) / sigma
    return -math.sin(t) * scaled + math.cos(t) * slope * 0.5 / math.cos(t) ** 2


@pytest.mark.parametrize("network", ["trigflow", "edm"])
@pytest.mark.parametrize(("iteration", "r"), [(0, 0.0), (3, 0.3), (12, 1.0)])
def test_training_is_that_of_the_paper(network, iteration, r):
    method, draws = make(network, warmup_iterations=10), Given()
    assert losses(method, iteration, draws) == pytest.approx(by_hand(network, of_the_line, r), rel=1e-6)
    assert draws.calls == [("normal", 3), ("normal", 3, 1, 2, 2)]


@pytest.mark.parametrize(
    ("teacher", "velocity"),
    [(TrigFlow(), of_a_trigflow_teacher), (EDM(), of_an_edm_teacher), (TrigFlow(network="edm"), of_an_edm_teacher)],
    ids=["trigflow", "edm", "trigflow-edm"],
)
@pytest.mark.parametrize("network", ["trigflow", "edm"])
def test_distillation_is_that_of_the_paper(network, teacher, velocity):
    settings = {"log_sigma_mean": -0.8, "log_sigma_std": 1.1, "tangent_c": 0.4, "warmup_iterations": 0}
    method = make(network, model(teacher, OTHER_WEIGHTS), **settings)
    assert losses(method) == pytest.approx(by_hand(network, velocity, 1.0, -0.8, 1.1, 0.4), rel=1e-6)


def test_finite_differences_are_nearly_the_derivative():
    exact = losses(make("trigflow"), 10_000)
    found = losses(make("trigflow", derivative="finite-differences", difference_step=1e-4), 10_000)
    assert found == pytest.approx(exact, rel=1e-7)
    assert found != exact


def test_gradient_is_that_of_the_tangent():
    """Minus the normalised tangent, through the network: -2 e^w / d · g · dF."""
    method = make("trigflow", warmup_iterations=0)
    loss = method.loss(images(), labels(), Given(), 0)
    found = torch.autograd.grad(loss.sum(), [method.model.unet.w, method.weighting.coefficients])
    step, moved = 1e-5, []
    unnormalised = by_hand("trigflow", of_the_line, 1.0)
    for i in range(3):  # what the target is made of does not move: only F does
        for sign in (1, -1):
            weights = [w + sign * step * (i == j) for j, w in enumerate(WEIGHTS)]
            moved.append(_moved(weights))
    slopes = [(moved[2 * i] - moved[2 * i + 1]) / (2 * step) for i in range(3)]
    assert found[0].tolist() == pytest.approx(slopes, rel=1e-4)
    times = [math.atan(math.exp(-1.0 + 1.4 * n) / 0.5) for n in NORMALS]
    weights = [sum(a * math.cos(2 * k * t) for k, a in enumerate(COEFFICIENTS)) for t in times]
    for k in range(5):  # d/dw (e^w e - w) = (loss + w) - 1
        expected = sum(
            (value + w - 1) * math.cos(2 * k * t) for value, w, t in zip(unnormalised, weights, times, strict=True)
        )
        assert found[1][k].item() == pytest.approx(expected, rel=1e-5)


def _moved(weights):
    """The sum of the losses where F has other weights and the target F⁻ + g has not."""
    total = 0.0
    for row, noise, normal, label in zip(IMAGES, NOISE, NORMALS, LABELS, strict=True):
        t = math.atan(math.exp(-1.0 + 1.4 * normal) / 0.5)
        tangents, moves = [], []
        for x0, unit in zip(row, noise, strict=True):
            x = math.cos(t) * x0 + math.sin(t) * 0.5 * unit
            dxdt = of_the_line(x, t, x0, 0.5 * unit, label)
            f, by_x, by_t = output(x / 0.5, t, label, "trigflow")
            slope = x + 0.5 * (by_x * dxdt / 0.5 + by_t)
            tangents.append(-(math.cos(t) ** 2) * (0.5 * f - dxdt) - math.cos(t) * math.sin(t) * slope)
            moves.append(output(x / 0.5, t, label, "trigflow", weights)[0] - f)
        norm = math.sqrt(sum(g**2 for g in tangents))
        weight = sum(a * math.cos(2 * k * t) for k, a in enumerate(COEFFICIENTS))
        squares = sum((m - g / (norm + 0.1)) ** 2 for m, g in zip(moves, tangents, strict=True))
        total += math.exp(weight) * squares / 4 - weight
    return total


@pytest.mark.parametrize("network", ["trigflow", "edm"])
def test_jvp_through_the_operators_is_the_finite_difference(network):
    """In float64, with dropout: both derivatives drop the same."""
    unet = tiny_unet(dropout=0.4).double().train()
    student = ConsistencyModel(unet, TrigFlow(network=network))
    generator = torch.Generator().manual_seed(1)
    x, dxdt = (torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    sigma, classes = torch.tensor([0.05, 0.5, 20.0]).double(), torch.tensor([0, 1, 2])

    def slope(**settings):
        method = ContinuousConsistencyTraining(student, ContinuousConsistencySettings(**settings), 1)
        with same_dropout(x):
            return method.slope(x, dxdt, sigma, classes)

    step = 1e-6 if network == "edm" else 1e-4
    found, expected = slope(), slope(derivative="finite-differences", difference_step=step)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_finite_differences_are_not_taken_in_bfloat16():
    """bfloat16 rounds to 1/256, many times the difference: under autocast they are what they are without."""
    torch.manual_seed(2)
    student = ConsistencyModel(tiny_unet(), TrigFlow())
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    settings = ContinuousConsistencySettings(derivative="finite-differences")
    method = ContinuousConsistencyTraining(student, settings, 1)
    x, dxdt = torch.randn(2, 2, *student.sample_shape)
    sigma, classes = torch.tensor([0.3, 2.0]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = method.slope(x, dxdt, sigma, classes)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(method.slope(x, dxdt, sigma, classes), expected)
    assert expected.abs().max() > 0.01


def test_the_weight_learns_the_size_of_the_loss():
    """At the optimum of exp(w) e - w, w is -ln e."""
    weighting = AdaptiveWeighting(4)
    t = torch.linspace(0.05, 1.5, 64)
    wanted = 1.5 + 0.7 * torch.cos(2 * t) - 0.4 * torch.cos(6 * t)
    assert torch.equal(weighting(t), torch.zeros(64))
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        w = weighting(t)
        (torch.exp(w - wanted) - w).mean().backward()
        optimizer.step()
    assert weighting.coefficients.tolist() == pytest.approx([1.5, 0.7, 0.0, -0.4], abs=1e-2)


def test_what_is_optimized_and_stored():
    method = make("trigflow")
    assert [id(p) for p in method.parameters()] == [id(method.model.unet.w), id(method.weighting.coefficients)]
    assert method.networks() == {"weighting": method.weighting}
    teacher = model(EDM(), OTHER_WEIGHTS)
    method = make("edm", teacher)
    assert method.teacher.unet is teacher.unet
    assert set(method.networks()) == {"weighting"}
    student = ContinuousConsistencyDistillation.student(teacher)
    assert student.preconditioning == TrigFlow(network="edm")
    assert student.sample(2, steps=2).shape == (2, 1, 2, 2)


def test_errors():
    with pytest.raises(ValueError, match="student: expected the preconditioning TrigFlow, got EDM"):
        ContinuousConsistencyTraining(model(EDM()), ContinuousConsistencySettings(), 1)
    with pytest.raises(ValueError, match="teacher: expected the preconditioning EDM or TrigFlow, got Consistency"):
        make("edm", model(Consistency()))
    with pytest.raises(ValueError, match=r"teacher's sigma_data is 0.7, the student's 0.5"):
        make("edm", model(EDM(sigma_data=0.7)))
    wrong = {
        "log_sigma_std": 0.0,
        "warmup_iterations": -1,
        "tangent_c": 0.0,
        "derivative": "vjp",
        "difference_step": 0.0,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            ContinuousConsistencySettings(**{name: value})


def test_autocast_rounds_no_weight():
    weighting, t = AdaptiveWeighting(), torch.linspace(0, 1.5, 7)
    with torch.no_grad():
        weighting.coefficients.copy_(torch.linspace(-1, 5.01, 32))
    expected = weighting(t)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighting(t)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
