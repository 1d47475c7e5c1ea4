import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from cmfast.checkpoints import CheckpointError
from cmfast.training import LoopSettings, power, reconstruct, train
from cmfast.training.averages import average_into, averaged_copy, exponential
from cmfast.training.averages import power as power_decay

from .tiny import Denoising, data


def test_average():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = averaged_copy(model)
    before = average[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1.0
        model[1].running_mean += 3.0
    average_into(average, model, 0.75)
    torch.testing.assert_close(average[0].weight, before + 0.25)
    assert torch.equal(average[1].running_mean, torch.full((2,), 3.0))
    assert not average[0].weight.requires_grad
    assert model[0].weight.requires_grad
    assert not average.training


def weights_of_updates(decay, count):
    """How much each of `count` updates weighs in an average, from the recursion."""
    weights = np.zeros(count)
    for update in range(1, count + 1):
        weights *= decay(update)
        weights[update - 1] += 1 - decay(update)
    return weights


def test_updates_of_an_exponential_average_weigh_less_and_less():
    """Update u has the decay u / (u + 10), at most the one that was asked for: the start is forgotten."""
    decay = exponential(0.15)
    assert [decay(u) for u in (1, 2, 3)] == pytest.approx([1 / 11, 0.15, 0.15])
    assert sum(weights_of_updates(exponential(0.999), 200)) == pytest.approx(1, abs=1e-5)
    plain = exponential(0.9, warmup=False)
    assert [plain(u) for u in (1, 2)] == [0.9, 0.9]


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_power_functions(sigma_rel):
    """The recursion gives the weights u^γ, whose relative standard deviation is sigma_rel."""
    gamma, count = power.gamma_of(sigma_rel), 4000
    assert power.sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    weights = weights_of_updates(power_decay(sigma_rel), count)
    assert weights.sum() == pytest.approx(1)
    times = np.arange(1, count + 1)
    expected = times**gamma / (times**gamma).sum() if gamma < 50 else np.exp(gamma * np.log(times / count))
    np.testing.assert_allclose(weights, expected / expected.sum(), atol=2e-3 * weights.max())
    mean = (weights * times).sum()
    assert math.sqrt((weights * (times - mean) ** 2).sum()) / count == pytest.approx(sigma_rel, rel=0.02)


def test_lengths_that_are_none():
    for wrong in (0.0, 0.29):
        with pytest.raises(ValueError, match="sigma_rel: expected a fraction"):
            power.gamma_of(wrong)
    assert power.gamma_of(0.28) > 0  # flat, nearly


@pytest.mark.parametrize(
    ("sigma_rel", "bound"), [(0.03, 0.015), (0.05, 1e-9), (0.075, 0.0015), (0.1, 1e-9), (0.15, 0.003), (0.2, 0.01)]
)
def test_snapshots_make_the_average_of_another_length(sigma_rel, bound):
    """Two tracks, 32 snapshots: how far the sum of their profiles is from the wanted one, in L²."""
    count, tracks = 800, (0.05, 0.1)
    times = [(time, track) for time in range(25, count + 1, 25) for track in tracks]
    profiles = np.stack([np.pad(weights_of_updates(power_decay(s), t), (0, count - t)) for t, s in times])
    factors = power.solve(
        [t for t, _ in times], [power.gamma_of(s) for _, s in times], count, power.gamma_of(sigma_rel)
    )
    assert factors.sum() == pytest.approx(1)
    wanted = weights_of_updates(power_decay(sigma_rel), count)
    assert np.linalg.norm(factors @ profiles - wanted) < bound * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A training with snapshots, the weights after each of its updates, and its model."""
    folder, seen = tmp_path_factory.mktemp("snapshots"), []
    method = Denoising()
    settings = LoopSettings(
        iterations=60, batch_size=4, learning_rate=0.01, power_ema=(0.05, 0.1), ema_decays=(), snapshot_interval=10
    )
    keep = lambda i, loss: seen.append(copy.deepcopy(method.model.state_dict()))  # noqa: E731
    return train(method, data(), settings, out=folder, progress=keep), folder / "snapshots", seen


@pytest.mark.parametrize(("sigma_rel", "iteration"), [(0.07, None), (0.1, 40), (0.05, None)])
def test_an_average_is_made_of_a_trainings_snapshots(snapshots, sigma_rel, iteration):
    trained, folder, seen = snapshots
    count = iteration or 60
    found = reconstruct(folder, trained.model, sigma_rel, iteration)
    factors = weights_of_updates(power_decay(sigma_rel), count)
    moved = 0.0
    for name, parameter in found.named_parameters():
        expected = sum(f * state[name].double() for f, state in zip(factors, seen, strict=False))
        spread = (seen[count - 1][name] - expected).abs().max()
        moved = max(moved, spread)
        assert (parameter - expected).abs().max() < 0.05 * spread + 1e-3  # float16 keeps three digits
    assert moved > 0.01
    assert found.unet.seen == count
    if sigma_rel == 0.05:
        for p, q in zip(found.parameters(), trained.averages["power-0.05"].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-3, atol=1e-4)


def test_snapshots_that_do_not_serve(snapshots, tmp_path):
    trained, folder, _ = snapshots
    with pytest.raises(FileNotFoundError, match="no snapshots"):
        reconstruct(tmp_path, trained.model, 0.1)
    for wrong, nearest in ((5, "10 and 20"), (70, "60 and 50"), (59, "60 and 50")):
        with pytest.raises(ValueError, match=f"no snapshot after {wrong} updates, the nearest are {nearest}"):
            reconstruct(folder, trained.model, 0.1, wrong)
    with pytest.raises(CheckpointError, match="another network"):
        reconstruct(folder, nn.Linear(2, 2), 0.1)
    other = copy.deepcopy(trained.model)
    other.unet.second = nn.Conv2d(4, 2, 3)
    with pytest.raises(CheckpointError, match=r"unet.second.weight is \[1, 4, 3, 3\], expected \[2, 4, 3, 3\]"):
        reconstruct(folder, other, 0.1)
