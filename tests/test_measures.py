"""Measures of samples, their intervals, and the search of levels (cmfast.evaluation)."""

import importlib
import itertools
import math
import sys
import types

import pytest
import torch

from cmfast import load
from cmfast.evaluation import (
    evaluate,
    interval,
    load_classifier,
    load_features,
    nearest_distance,
    precision_recall,
    report,
    sweep,
)
from cmfast.training import load_digits


def slowly(real, samples, k):
    """Kynkäänniemi's definition, word for word."""

    def radius(point, own):
        return sorted(math.dist(point, other) for other in own)[k]  # the nearest is the point itself

    def within(points, members):
        return [any(math.dist(p, m) <= radius(m, members) for m in members) for p in points]

    return within(samples, real), within(real, samples)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k, monkeypatch):
    module = importlib.import_module("cmfast.evaluation.precision_recall")  # the package has the function of that name
    monkeypatch.setattr(module, "_ROWS", 7)
    g = torch.Generator().manual_seed(0)
    real, samples = torch.randn(20, 3, generator=g), 0.7 * torch.randn(17, 3, generator=g) + 0.5
    precise, recalled = precision_recall(real, samples, k)
    expected = slowly(real.tolist(), samples.tolist(), k)
    assert (precise.tolist(), recalled.tolist()) == expected
    assert 0 < sum(expected[0]) < 17
    assert 0 < sum(expected[1]) < 20


def test_precision_and_recall_at_their_ends():
    real = torch.arange(10.0)[:, None]
    same, far = precision_recall(real, real), precision_recall(real, real + 1000)
    assert same.precise.all()
    assert same.recalled.all()
    assert not far.precise.any()
    assert not far.recalled.any()
    one = precision_recall(real, torch.full((5, 1), 4.0))  # all alike: precise, and one real image is covered
    assert one.precise.all()
    assert one.recalled.sum() == 1


@pytest.mark.parametrize(
    ("real", "samples", "message"),
    [
        ((3, 2), (9, 2), "3 neighbours need more members"),
        ((9, 2), (9, 3), "expected .M, D. and .N, D."),
        ((9,), (9,), "M, D"),
    ],
)
def test_precision_and_recall_of_what_has_none(real, samples, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(torch.zeros(real), torch.zeros(samples))


def test_the_interval_of_a_mean_is_the_textbooks():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 3
    found = interval(lambda indices: values[indices].mean().item(), 400, resamples=1000)
    half = 1.96 * values.std().item() / 20
    assert found.value == pytest.approx(values.mean().item())
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert interval(lambda indices: values[indices].mean().item(), 400, resamples=1000) == found
    assert interval(lambda indices: values[indices].mean().item(), 400, resamples=1000, level=0.5).high < found.high


def test_the_interval_lies_about_a_value_that_repeated_samples_enlarge():
    """The number of different samples in a drawing is always less than that of all."""
    found = interval(lambda indices: -float(len(indices.unique())), 100)
    assert found.value == -100
    assert found.low < -100 < found.high


@pytest.mark.parametrize("arguments", [(1, 200, 0.95), (9, 1, 0.95), (9, 200, 1.0)])
def test_intervals_of_too_little(arguments):
    count, resamples, level = arguments
    with pytest.raises(ValueError, match="two samples and resamples or more"):
        interval(lambda indices: 0.0, count, resamples=resamples, level=level)


def test_a_report_has_all_measures():
    model, features = load("digits"), load_features()
    labels = torch.arange(60) % 10
    samples = model.sample(60)
    train, test = load_digits()
    found = {m.name: m for m in report(samples, labels, features, real=test.images, train=train.images, resamples=3)}
    quality = evaluate(samples, labels, load_classifier())
    assert found["accuracy"].value.value == pytest.approx(quality.accuracy)
    assert found["Fréchet to test"].value.value == pytest.approx(quality.frechet_test)
    assert found["Fréchet to train"].value.value == pytest.approx(quality.frechet_train)
    real = evaluate(test.images, test.labels, load_classifier())
    assert found["Fréchet to train"].real == pytest.approx(real.frechet_train, rel=1e-3)
    assert found["Fréchet to data"].value.value == pytest.approx(quality.frechet_test, rel=1e-2)
    nearest = found["distance to the nearest training image"]
    assert nearest.value.value == pytest.approx(nearest_distance(samples, train.images))
    assert nearest.real == pytest.approx(nearest_distance(test.images, train.images))
    assert {m.count for m in found.values()} == {60, 359}  # recall is of the real images
    copies = {m.name: m for m in report(train.images[:60], None, features, train=train.images, resamples=3)}
    assert "accuracy" not in copies
    assert copies["distance to the nearest training image"].value.value < 1e-3


def test_a_report_of_what_does_not_fit():
    features, samples = load_features(), torch.zeros(4, 1, 8, 8)
    for arguments, message in (
        ((samples[:1], None), "at least two samples"),
        ((samples, torch.zeros(3)), "as many labels"),
    ):
        with pytest.raises(ValueError, match=message):
            report(*arguments, features)
    with pytest.raises(ValueError, match=r"samples are \[1, 8, 8\], and train \[3, 8, 8\]"):
        report(samples, None, features, train=torch.zeros(2, 3, 8, 8))
    with pytest.raises(FloatingPointError, match="2 of 2 samples are not finite"):
        report(samples, None, features, real=torch.full((2, 1, 8, 8), torch.nan))
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"at least 4 real images and samples, got {count} and 4"):
            report(samples, None, features, real=torch.zeros(count, 1, 8, 8))
    with pytest.raises(ValueError, match="at least 4 real images and samples, got 9 and 3"):
        report(samples[:3], None, features, real=torch.zeros(9, 1, 8, 8))
    with pytest.raises(ValueError, match="at least one training image, got 0"):
        report(samples, None, features, train=samples[:0])


def test_a_report_of_the_fewest_images():
    samples = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = report(samples, None, load_features(), real=samples, train=samples[:1], resamples=2)
    assert all(math.isfinite(measure.value.value) for measure in found)


def test_inception_sees_pixels_in_colour(monkeypatch):
    seen = []

    class Extractor(torch.nn.Module):
        def __init__(self, name, layers):
            super().__init__()
            assert layers == ["2048"]

        def forward(self, pixels):
            seen.append(pixels)
            return (pixels.float().mean((1, 2, 3))[:, None].expand(-1, 2048),)

    package, module = (
        types.ModuleType("torch_fidelity"),
        types.ModuleType("torch_fidelity.feature_extractor_inceptionv3"),
    )
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    features = load_features("inception")
    assert features.of(torch.ones(2, 1, 8, 8)).shape == (2, 2048)
    assert seen[0].dtype == torch.uint8
    assert seen[0].shape == (2, 3, 8, 8)
    assert (seen[0] == 255).all()


def test_the_levels_that_are_best_are_found():
    best, scored = (80.0, 3.0, 0.2), []

    def score(levels):
        scored.append(levels)
        return sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(levels, best, strict=False)) + 3 - len(levels)

    found = [*sweep(score, 3, sigma_max=80.0, sigma_min=0.002, iterations=12)]
    assert [len(one.levels) for one in found] == [1, 2, 3]
    assert found[-1].levels == pytest.approx(best, rel=0.1)
    assert found[-1].score < 1e-2
    assert len(scored) == 1 + 2 * 24
    assert all(a > b for levels in scored for a, b in itertools.pairwise(levels))
    assert all(one.score == score(one.levels) for one in found)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"iterations": 0}, {"sigma_min": 0.0}, {"sigma_max": 0.001}])
def test_a_search_of_nothing(wrong):
    arguments = {"steps": 2, "iterations": 2, "sigma_min": 0.002, "sigma_max": 80.0} | wrong
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        next(sweep(lambda levels: 0.0, **arguments))
