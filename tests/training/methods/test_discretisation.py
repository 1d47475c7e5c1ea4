"""Schedules against numbers worked out by hand and against brute force."""

import itertools
import math

import pytest
import torch

from cmfast.preconditioning import EDM
from cmfast.training.methods.discretisation import (
    doubling_steps,
    log_normal_index,
    neighbours,
    square_root_steps,
    target_decay,
)

from .toy import karras


def test_square_root_schedule():
    """N(k) of 4 updates from 2 to 5: √(k/4 · 21 + 4) is 2, 3.04, 3.81, 4.44 and 5."""
    assert [square_root_steps(k, 4, 2, 4) for k in range(5)] == [2, 4, 4, 5, 5]
    assert [square_root_steps(k, 400_000, 2, 150) for k in (0, 100_000, 200_000, 399_999)] == [2, 76, 107, 151]


def test_doubling_schedule():
    """128 = 2⁷: eight periods of 100 updates."""
    assert [doubling_steps(k, 800, 10, 1280) for k in (0, 99, 100, 199, 200, 699, 700, 799)] == [
        *(11, 11, 21, 21, 41, 641, 1281, 1281),
    ]
    # log2 of 100 is 6.64: periods of ⌊800 / 7.64⌋ = 104, and 10 · 2⁷ is more than 1000.
    assert [doubling_steps(k, 800, 10, 1000) for k in (103, 104, 727, 728, 799)] == [11, 21, 641, 1001, 1001]
    assert [doubling_steps(k, 3, 10, 1280) for k in range(3)] == [11, 21, 41]  # a period of one update at least


def test_decay_of_the_target():
    assert target_decay(2, 2, 0.9) == pytest.approx(0.9)
    assert target_decay(20, 2, 0.9) == pytest.approx(0.9**0.1)
    assert target_decay(151, 2, 0.95) == pytest.approx(0.95 ** (2 / 151))


def test_neighbours_on_the_grid():
    low, high = neighbours(EDM(), torch.tensor([0.0, 3.0, 5.0]).double(), 7, torch.zeros(1).double())
    assert low.tolist() == pytest.approx([karras(i, 7) for i in (0, 3, 5)], rel=1e-12)
    assert high.tolist() == pytest.approx([karras(i, 7) for i in (1, 4, 6)], rel=1e-12)
    assert EDM().grid(7)[:-1] == pytest.approx([karras(i, 7) for i in range(6, -1, -1)])
    assert neighbours(EDM(), torch.zeros(1).double(), 7, torch.zeros(1))[0].dtype == torch.float32


@pytest.mark.parametrize(("steps", "mean", "std"), [(2, -1.1, 2.0), (11, -1.1, 2.0), (41, 0.5, 0.3)])
def test_levels_are_log_normal_on_the_grid(steps, mean, std):
    """Song and Dhariwal 2023, section 3.5: as often as ln sigma falls between two levels."""
    levels = [karras(i, steps) for i in range(steps)]
    areas = [math.erf((math.log(s) - mean) / (math.sqrt(2) * std)) for s in levels]
    chances = [(b - a) / (areas[-1] - areas[0]) for a, b in itertools.pairwise(areas)]
    uniform = [(i + 0.5) / 500 for i in range(500)]
    expected = []
    for u in uniform:
        index = 0
        while index < steps - 2 and u >= sum(chances[: index + 1]):
            index += 1
        expected.append(index)
    found = log_normal_index(EDM(), torch.tensor(uniform).double(), steps, mean, std)
    assert found.dtype == torch.float64
    assert found.tolist() == expected
    ends = log_normal_index(EDM(), torch.tensor([0.0, 1 - 2**-24]), steps, mean, std)
    assert ends[0] >= 0
    assert ends[1] <= steps - 2
