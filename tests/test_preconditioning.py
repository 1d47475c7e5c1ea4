import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from cmfast import CheckpointError, ConsistencyModel, load
from cmfast.preconditioning import (
    EDM,
    Consistency,
    Flow,
    LatentConsistency,
    TrajectoryConsistency,
    TrigFlow,
)

from .fixture_files import tiny_unet

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
    a, b, c_in, c_noise = scheme.coefficients(float(t), None if following is None else float(following))
    assert a * x + b * output == pytest.approx(at_s)
    assert (c_in, c_noise) == (1.0, t)
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


@pytest.mark.parametrize(("scheme", "levels"), SCHEMES, ids=IDS)
def test_a_clean_sample_comes_to_a_level(scheme, levels):
    """The first two moments of data with one value, after `noising`, are those that the scheme's levels have."""
    for sigma in levels:
        alpha, beta = scheme.noising(sigma)
        if isinstance(scheme, TrajectoryConsistency):  # D is the sample at timestep 0
            bars = scheme.alphas_cumprod
            alpha, beta = alpha * math.sqrt(bars[0]), math.sqrt(beta**2 + alpha**2 * (1 - bars[0]))
        expected = {
            EDM: (1, sigma),
            Consistency: (1, math.sqrt(sigma**2 - EPS**2)),
            TrigFlow: (SD / math.hypot(sigma, SD), SD * sigma / math.hypot(sigma, SD)),
            Flow: (1 - sigma, sigma),
        }.get(type(scheme))
        if expected is None:
            bar = scheme.alphas_cumprod[int(sigma)]
            expected = math.sqrt(bar), math.sqrt(1 - bar)
        assert (alpha, beta) == pytest.approx(expected)


def test_levels_of_a_flow():
    for wrong in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1, got"):
            Flow().coefficients(wrong)


def test_latent_levels_are_the_published_ones():
    assert LatentConsistency().levels(4) == [999, 759, 499, 259]
    assert LatentConsistency().levels(1) == [999]
    assert LatentConsistency().levels(50) == [20 * k - 1 for k in range(50, 0, -1)]


def test_levels_of_the_other_schemes():
    grid = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    for scheme in (EDM(), Consistency(), TrigFlow()):
        assert scheme.levels(4) == pytest.approx(grid[:4])  # the fifth would change nothing
        assert scheme.grid(5) == pytest.approx([*grid, 0.0])
    assert EDM(sigma_min=0.5, sigma_max=2.0, rho=1.0).grid(4) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert Flow().levels(4) == [1.0, 0.75, 0.5, 0.25]


def test_noise_is_added_as_the_forward_process_does():
    assert EDM().renoise(3.0) == (1.0, 3.0)
    assert Consistency().renoise(0.001) == (1.0, 0.0)  # below the level at which the sample stands
    assert Consistency(sigma_min=0.6).renoise(1.0) == pytest.approx((1.0, 0.8))
    assert Flow().renoise(0.25) == (0.75, 0.25)


def test_the_noise_at_the_start():
    assert EDM().initial_scale(80.0) == Consistency().initial_scale(80.0) == 80.0
    assert TrigFlow().initial_scale(80.0) == pytest.approx(80 * SD / math.sqrt(80**2 + SD**2))
    assert (Flow().initial_scale(0.7), LatentConsistency().initial_scale(999.0)) == (0.7, 1.0)


def test_what_is_said_where_nothing_else_is():
    """Trajectory consistency has the paper's gamma 0.3 (Zheng et al. 2024, section 5.1); latents Stable Diffusion's."""
    assert TrajectoryConsistency() == TrajectoryConsistency(eta=0.3)
    assert TrajectoryConsistency().alphas_cumprod.numpy() == pytest.approx(alphas_cumprod())
    other = LatentConsistency(num_train_timesteps=100, beta_start=0.01, beta_end=0.04, original_steps=10)
    assert other.alphas_cumprod.numpy() == pytest.approx(np.cumprod(1 - np.linspace(0.1, 0.2, 100) ** 2))
    assert other.levels(3) == [99, 69, 39]


def test_timesteps_are_the_schedules_own():
    scheme = LatentConsistency()
    assert scheme.alpha_bar(0.0) == pytest.approx(1 - 0.00085)
    assert scheme.alpha_bar(999) == scheme.alpha_bar(torch.tensor([999.0])).item() == scheme.alphas_cumprod[-1].item()
    for wrong in (-1.0, 1000.0, 0.5):
        with pytest.raises(ValueError, match=r"whole number in \[0, 1000\)"):
            scheme.alpha_bar(wrong)
    for wrong in (0, 51):
        with pytest.raises(ValueError, match=r"steps must be in 1 … 50"):
            scheme.levels(wrong)


def test_trajectories_of_tensors_end_where_those_of_floats_do():
    scheme, t, following = TrajectoryConsistency(), [999.0, 259.0], [759.0, 19.0]
    together = scheme.coefficients(torch.tensor(t).double(), torch.tensor(following).double())
    for i in range(2):
        expected = scheme.coefficients(t[i], following[i])
        assert [value[i].item() for value in together] == pytest.approx(list(expected))


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


WRONG = [
    (EDM, {"sigma_data": math.nan}, "sigma_data must be positive, got nan"),
    (EDM, {"num_train_timesteps": 40.5}, "num_train_timesteps must be a whole number of at least 1, got 40.5"),
    (TrigFlow, {"clip_denoised": "false"}, "clip_denoised must be True or False, got 'false'"),
    (Flow, {"num_train_timesteps": 0}, "num_train_timesteps must be a whole number of at least 1, got 0"),
    (Flow, {"num_train_timesteps": math.inf}, "num_train_timesteps must be a whole number of at least 1, got inf"),
    (Flow, {"clip_denoised": None}, "clip_denoised must be True or False, got None"),
    (LatentConsistency, {"num_train_timesteps": 0}, "num_train_timesteps must be a whole number of at least 1, got 0"),
    (LatentConsistency, {"num_train_timesteps": 10}, "original_steps must be a whole number in 1 … 10, got 50"),
    (LatentConsistency, {"original_steps": 0}, "original_steps must be a whole number in 1 … 1000, got 0"),
    (LatentConsistency, {"beta_start": -0.1}, "beta_start must be at least 0 and below 1, got -0.1"),
    (LatentConsistency, {"beta_end": 5.0}, "beta_end must be at least 0 and below 1, got 5.0"),
    (LatentConsistency, {"sigma_data": 0.0}, "sigma_data must be positive, got 0.0"),
    (LatentConsistency, {"sigma_data": math.nan}, "sigma_data must be positive, got nan"),
    (LatentConsistency, {"timestep_scaling": -1.0}, "timestep_scaling must be positive, got -1.0"),
    (LatentConsistency, {"timestep_scaling": math.inf}, "timestep_scaling must be positive, got inf"),
    (TrajectoryConsistency, {"original_steps": 1001}, "original_steps must be a whole number in 1 … 1000, got 1001"),
    (TrajectoryConsistency, {"beta_end": math.nan}, "beta_end must be at least 0 and below 1, got nan"),
    (TrajectoryConsistency, {"eta": -0.5}, r"eta must be in \[0, 1\], got -0.5"),
    (TrajectoryConsistency, {"eta": 2.0}, r"eta must be in \[0, 1\], got 2.0"),
    (TrajectoryConsistency, {"eta": math.nan}, r"eta must be in \[0, 1\], got nan"),
]


@pytest.mark.parametrize(("scheme", "wrong", "message"), WRONG)
def test_numbers_that_make_no_scheme(scheme, wrong, message):
    with pytest.raises(ValueError, match=f"^{scheme.__name__}: {message}$"):
        scheme(**wrong)


def test_files_with_numbers_that_make_no_scheme(tmp_path):
    ConsistencyModel(tiny_unet()).save(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for scheme, wrong, message in WRONG:
        content["preconditioning"] = {"type": scheme.__name__, **wrong}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"config.json is not .* {message}"):
            load(tmp_path)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("scheme", "wrong", "right", "message"),
    [
        (EDM(), (0.0, -1.0, math.nan, math.inf), (0.002, 500.0), "a level sigma must be positive and finite"),
        (Consistency(), (0.0, -1.0, math.nan, math.inf), (0.002, 80.0), "a level sigma must be positive and finite"),
        (TrigFlow(), (-1.0, math.nan), (0.1,), "a level sigma must be positive and finite"),
        (TrigFlow(network="edm"), (0.0, -1.0), (0.1,), "a level sigma must be positive and finite"),
        (Flow(), (0.0, 2.0, -1.0, math.nan), (1.0, 0.1), "a level of a flow must be above 0 and at most 1"),
        (LatentConsistency(), (-1.0, 10.5, 1000.0, math.nan), (0.0, 999.0), r"a whole number in \[0, 1000\)"),
        (TrajectoryConsistency(), (-1.0, 10.5, 1000.0), (999.0,), r"a whole number in \[0, 1000\)"),
    ],
)
def test_levels_that_a_scheme_does_not_have(scheme, wrong, right, message, as_tensor):
    """Of a model's tensors as of its numbers."""
    model = ConsistencyModel(nn.Identity(), scheme, sample_shape=(1, 2, 2))
    model.unet.forward = lambda x, timesteps, class_labels=None: x
    model.unet.p = nn.Parameter(torch.zeros(1))
    x = torch.zeros(2, 1, 2, 2)
    for level in right:
        model.denoise(x, torch.tensor([right[0], level]) if as_tensor else level)
    for level in wrong:
        with pytest.raises(ValueError, match=message):
            model.denoise(x, torch.tensor([right[0], level]) if as_tensor else level)
