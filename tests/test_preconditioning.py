import math

import numpy as np
import pytest
import torch

from cmfast.preconditioning import (
    EDM,
    Consistency,
    Flow,
    LatentConsistency,
    TrajectoryConsistency,
    TrigFlow,
)

SD, EPS = 0.5, 0.002
SCHEMES = [
    (EDM(), [0.002, 0.5, 80.0]),
    (Consistency(), [0.002, 0.5, 80.0]),
    (TrigFlow(), [0.002, 0.5, 80.0]),
    (Flow(), [0.25, 0.5, 1.0]),
    (LatentConsistency(), [19.0, 499.0, 999.0]),
    (LatentConsistency(prediction_type="v_prediction"), [19.0, 499.0, 999.0]),
    (TrajectoryConsistency(), [19.0, 499.0, 999.0]),
]
IDS = ["edm", "consistency", "trigflow", "flow", "lcm", "lcm-v", "tcd"]


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_edm_and_consistency(sigma):
    a, b, c_in, c_noise = EDM().coefficients(sigma)
    assert a == pytest.approx(SD**2 / (sigma**2 + SD**2))
    assert b == pytest.approx(sigma * SD / math.sqrt(sigma**2 + SD**2))
    assert c_in == pytest.approx(1 / math.sqrt(sigma**2 + SD**2))
    assert c_noise == pytest.approx(250 * math.log(sigma))
    a, b, c_in_c, c_noise_c = Consistency().coefficients(sigma)
    assert a == pytest.approx(SD**2 / ((sigma - EPS) ** 2 + SD**2))
    assert b == pytest.approx((sigma - EPS) * SD / math.sqrt(sigma**2 + SD**2))
    assert (c_in_c, c_noise_c) == (c_in, c_noise)


def test_boundary_condition():
    assert Consistency().coefficients(EPS)[:2] == (1.0, 0.0)
    assert Consistency().renoise(EPS) == (1.0, 0.0)
    assert Consistency().renoise(2.0)[1] == pytest.approx(math.sqrt(4 - EPS**2))


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_trigflow_recovers_the_sample_from_its_velocity(sigma):
    # x = cos t x0 + sin t σd z; the network's output F gives dx/dt = σd F = -sin t x0 + cos t σd z
    x0, z, t = 0.7, -1.3, math.atan(sigma / SD)
    x = math.cos(t) * x0 + math.sin(t) * SD * z
    output = (-math.sin(t) * x0 + math.cos(t) * SD * z) / SD
    a, b, c_in, c_noise = TrigFlow().coefficients(sigma)
    assert a * x + b * output == pytest.approx(x0)
    assert (c_in, c_noise) == (1 / SD, t)
    alpha, beta = TrigFlow().renoise(sigma)
    assert alpha * x0 + beta * z == pytest.approx(x)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_flow_recovers_the_sample_from_its_velocity(sigma):
    x0, z = 0.7, -1.3
    alpha, beta = Flow().renoise(sigma)
    x = alpha * x0 + beta * z
    a, b, c_in, c_noise = Flow().coefficients(sigma)
    assert a * x + b * (z - x0) == pytest.approx(x0)
    assert (c_in, c_noise) == (1.0, 1000 * sigma)


def alphas_cumprod():
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [19, 499, 999])
def test_latent_consistency_is_the_published_two_stages(t, prediction_type):
    x, output, bar = 0.3, -0.8, alphas_cumprod()[t]
    if prediction_type == "epsilon":
        x0 = (x - math.sqrt(1 - bar) * output) / math.sqrt(bar)
    else:
        x0 = math.sqrt(bar) * x - math.sqrt(1 - bar) * output
    tau = 10.0 * t
    expected = SD**2 / (tau**2 + SD**2) * x + tau / math.sqrt(tau**2 + SD**2) * x0
    scheme = LatentConsistency(prediction_type=prediction_type)
    a, b, c_in, c_noise = scheme.coefficients(float(t))
    assert a * x + b * output == pytest.approx(expected)
    assert (c_in, c_noise) == (1.0, t)
    assert scheme.renoise(float(t)) == pytest.approx((math.sqrt(bar), math.sqrt(1 - bar)))


@pytest.mark.parametrize(("t", "following"), [(999, 759), (259, 19), (999, None)])
def test_trajectory_consistency_is_the_published_two_stages(t, following):
    bars, x, output, z, eta = alphas_cumprod(), 0.3, -0.8, 1.7, 0.3
    s = math.floor((1 - eta) * (following or 0))
    x0 = (x - math.sqrt(1 - bars[t]) * output) / math.sqrt(bars[t])
    at_s = math.sqrt(bars[s]) * x0 + math.sqrt(1 - bars[s]) * output
    scheme = TrajectoryConsistency(eta=eta)
    a, b, _, _ = scheme.coefficients(float(t), None if following is None else float(following))
    assert a * x + b * output == pytest.approx(at_s)
    if following is not None:
        ratio = bars[following] / bars[s]
        alpha, beta = scheme.renoise(float(following))
        assert alpha * at_s + beta * z == pytest.approx(math.sqrt(ratio) * at_s + math.sqrt(1 - ratio) * z)


@pytest.mark.parametrize(("scheme", "levels"), SCHEMES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_give_what_floats_give(scheme, levels, dtype):
    together = scheme.coefficients(torch.tensor(levels, dtype=dtype))
    for i, sigma in enumerate(levels):
        for tensor, number in zip(together, scheme.coefficients(sigma), strict=True):
            assert tensor.shape == (len(levels),)
            assert tensor.dtype == dtype
            assert tensor[i].item() == pytest.approx(number, rel=1e-6 if dtype == torch.float32 else 1e-12, abs=1e-7)


@pytest.mark.parametrize(("scheme", "levels"), SCHEMES, ids=IDS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_default_levels_decrease(scheme, levels, steps):
    chosen = scheme.levels(steps)
    assert len(chosen) == steps
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] > 0
    assert scheme.initial_scale(chosen[0]) > 0


def test_latent_levels_are_the_published_ones():
    assert LatentConsistency().levels(4) == [999, 759, 499, 259]
    assert LatentConsistency().levels(1) == [999]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EDM().coefficients(0.0), "must be positive"),
        (lambda: LatentConsistency().coefficients(1000.0), "whole number"),
        (lambda: LatentConsistency().coefficients(2.5), "whole number"),
        (lambda: LatentConsistency(prediction_type="sample"), "prediction_type"),
        (lambda: LatentConsistency().levels(51), "steps must be"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
