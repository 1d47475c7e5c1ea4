import dataclasses
import errno
import os
import types

import pytest
import torch

from cmfast import CheckpointError, ConsistencyModel, load
from cmfast.cli.bench import latency_report
from cmfast.evaluation import (
    Classifier,
    Quality,
    evaluate,
    frechet_distance,
    latency,
    load_classifier,
    load_features,
    nearest_distance,
    report,
)
from cmfast.evaluation.classifier import feature_statistics, save_classifier
from cmfast.evaluation.latency import Latency, Plan, equal_quality, measure
from cmfast.evaluation.quality import nearest_distances
from cmfast.preconditioning import EDM
from cmfast.training.data import load_digits

from .fixture_files import tiny_unet


def test_frechet_distance_of_known_gaussians():
    eye = torch.eye(3)
    assert frechet_distance(torch.zeros(3), eye, torch.zeros(3), eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(torch.ones(3), eye, torch.zeros(3), eye) == pytest.approx(3)
    # commuting covariances: Σ (√a - √b)²
    a, b = torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.diag(torch.tensor([4.0, 4.0, 1.0]))
    assert frechet_distance(torch.zeros(3), a, torch.zeros(3), b) == pytest.approx(1 + 0 + 4)


def test_frechet_distance_is_symmetric_and_invariant_under_rotation():
    g = torch.Generator().manual_seed(0)
    features = [torch.randn(200, 5, generator=g) @ torch.randn(5, 5, generator=g) for _ in range(2)]
    s1, s2 = (feature_statistics(f) for f in features)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=g))[0]
    r1, r2 = (feature_statistics(f @ rotation) for f in features)
    distance = frechet_distance(*s1, *s2)
    assert frechet_distance(*s2, *s1) == pytest.approx(distance)
    assert frechet_distance(*r1, *r2) == pytest.approx(distance, rel=1e-4)


def test_frechet_distance_of_singular_covariances():
    flat = torch.zeros(3, 3)
    assert frechet_distance(torch.zeros(3), flat, torch.zeros(3), torch.eye(3)) == pytest.approx(3)


def test_a_set_has_no_distance_to_itself():
    for count, features, size in ((100, 512, 20.0), (10, 64, 1e3)):
        found = torch.rand(count, features, dtype=torch.float64) * size
        statistics = feature_statistics(found)
        assert abs(frechet_distance(*statistics, *statistics)) < 1e-6


def test_nearest_distance():
    images = torch.zeros(5, 1, 2, 2)
    assert nearest_distance(images, images) == 0
    assert nearest_distance(torch.ones(2, 1, 2, 2), images) == pytest.approx(2)


def test_the_bundled_classifier_knows_real_digits():
    train, test = load_digits()
    classifier = load_classifier()
    real = evaluate(test.images, test.labels, classifier)
    assert real.accuracy > 0.97
    assert real.frechet_test == pytest.approx(0, abs=1e-3)
    again = evaluate(train.images, train.labels, classifier)
    assert again.frechet_train == pytest.approx(0, abs=1e-3)
    assert again.frechet_test == pytest.approx(real.frechet_train, rel=1e-3)
    noise = evaluate(torch.randn(300, 1, 8, 8).clamp(-1, 1), torch.arange(300) % 10, classifier)
    assert noise.accuracy < 0.3
    assert noise.frechet_train > 10 * real.frechet_train
    one_class = test.labels == 3
    threes = evaluate(test.images[one_class], test.labels[one_class], classifier)
    assert threes.frechet_train > 5 * real.frechet_train


@pytest.mark.parametrize(("steps", "accuracy", "to_test", "to_train"), [(1, 0.97, 1.3, 3.5), (2, 0.99, 1.3, 2.2)])
def test_quality_of_the_bundled_model(steps, accuracy, to_test, to_train):
    """On 1,000 samples; the bounds are multiples of the teacher's distances at Heun 40, from the model card."""
    labels = torch.arange(1000) % 10
    samples = load("digits").sample(1000, class_labels=labels, steps=steps, batch_size=250)
    quality = evaluate(samples, labels, load_classifier())
    assert quality.accuracy >= accuracy
    assert quality.frechet_test <= to_test * HEUN_40.frechet_test
    assert quality.frechet_train <= to_train * HEUN_40.frechet_train


#: The teacher's quality at Heun 40, as the model card has it; 79 evaluations are too slow to repeat in a test.
HEUN_40 = Quality(accuracy=0.992, frechet_test=2.81, frechet_train=0.413)


def test_classifier_files(tmp_path):
    classifier = Classifier(channels=3, size=16, num_classes=4).eval()
    classifier.half().float()
    classifier.set_statistics("train", torch.randn(20, 3, 16, 16))
    save_classifier(classifier, tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), classifier(x))
    assert torch.equal(again.statistics("train")[1], classifier.statistics("train")[1])
    with pytest.raises(FileNotFoundError, match="no classifier"):
        load_classifier(tmp_path / "none")
    (tmp_path / "c.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="not a classifier"):
        load_classifier(tmp_path / "c.safetensors")


def test_a_classifier_that_may_not_be_read(tmp_path, monkeypatch):
    """The file is there: it is not said to be missing, nor damaged."""
    path = tmp_path / "c.safetensors"
    save_classifier(Classifier(), path)

    def refuse(self, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*c\.safetensors"):
        load_classifier(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_classifier_is_single_whatever_torch_takes_for_others(dtype):
    expected = load_classifier()
    images = load_digits()[1].images[:5]
    torch.set_default_dtype(dtype)
    try:
        found = load_classifier()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}
    assert torch.equal(found(images), expected(images))


@pytest.mark.parametrize("size", [8, 15, 16, 17, 28, 36, 64])
def test_classifiers_of_all_sizes(tmp_path, size):
    classifier = Classifier(size=size).eval().half().float()
    save_classifier(classifier, tmp_path / "c.safetensors")
    x = torch.randn(2, 1, size, size)
    assert torch.equal(load_classifier(tmp_path / "c.safetensors")(x), classifier(x))


def test_nothing_is_nearest_among_none():
    with pytest.raises(ValueError, match="at least one image, got 0"):
        nearest_distance(torch.zeros(2, 1, 2, 2), torch.zeros(0, 1, 2, 2))


def test_copies_have_no_distance():
    """Also among so many that distances are found by products, which lose small ones."""
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert nearest_distances(images[:50], images).tolist() == [0.0] * 50
    moved = images[:50].clone()
    moved[:, 0, 0, 0] += 0.125
    assert nearest_distances(moved, images).tolist() == pytest.approx([0.125] * 50, rel=1e-6)


def test_samples_that_are_no_numbers_are_not_measured():
    samples = torch.zeros(3, 1, 8, 8)
    samples[1, 0, 2, 3] = float("nan")
    for measured in (
        lambda: evaluate(samples, torch.tensor([0, 1, 2]), load_classifier()),
        lambda: report(samples, None, load_features("digits")),
    ):
        with pytest.raises(FloatingPointError, match="1 of 3 samples are not finite"):
            measured()


def test_evaluate_checks():
    with pytest.raises(ValueError, match="at least two"):
        evaluate(torch.zeros(1, 1, 8, 8), torch.zeros(1), load_classifier())


def test_latency_counts_evaluations_and_measures_quality():
    model = ConsistencyModel(tiny_unet(), EDM())
    plans = [Plan("m", model, "heun", 3), Plan("m", model, "multistep", 2)]
    seen = []
    rows = measure(
        plans,
        batch_size=4,
        rounds=3,
        classifier=load_classifier(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [row.evaluations for row in rows] == [5, 2]
    assert seen == [(i, 6) for i in range(1, 7)]
    for row in rows:
        assert 0 < row.fastest <= row.seconds <= row.slowest
        assert row.samples_per_second == pytest.approx(4 / row.seconds)
        assert 0 <= row.quality.accuracy <= 1
    labels = torch.arange(12) % 10
    expected = evaluate(model.sample(12, sampler="heun", steps=3), labels, load_classifier())
    assert rows[0].quality == pytest.approx(expected, rel=1e-3)


def test_evaluate_takes_two_samples():
    images, labels, *_ = load_digits()[1]
    quality = evaluate(images[:2], torch.stack((labels[0], labels[1] + 1)), load_classifier())
    assert quality.accuracy == 0.5
    with pytest.raises(ValueError, match=r"as many labels, got 2 and \[3\]"):
        evaluate(images[:2], labels[:3], load_classifier())


def test_a_classifier_is_the_digits_own_unless_told_otherwise():
    classifier = Classifier()
    classifier.load_state_dict(load_classifier().state_dict())  # the same shapes
    images = load_digits()[1].images
    classifier.train()
    assert not torch.equal(classifier(images), classifier(images))  # dropout
    assert torch.equal(classifier.eval()(images), load_classifier()(images))
    torch.manual_seed(0)
    hidden = []
    classifier.out.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    classifier.train()(images)
    active = classifier.features(images) > 0
    assert hidden[0][active].eq(0).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_feature_statistics():
    mean, covariance = feature_statistics(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]))
    assert mean.tolist() == [3, 3]
    assert covariance.tolist() == [[4, -1], [-1, 7]]
    assert mean.dtype == covariance.dtype == torch.float64
    for few in (0, 1):
        with pytest.raises(ValueError, match=f"at least two samples, got {few}"):
            feature_statistics(torch.zeros(few, 2))
        with pytest.raises(ValueError, match=f"at least two samples, got {few}"):
            Classifier().set_statistics("train", torch.zeros(few, 1, 8, 8))


def test_latency_of_a_model_without_classes():
    model = ConsistencyModel(tiny_unet(num_classes=None), EDM())
    (found,) = measure([Plan("m", model, "euler", 1)], batch_size=3, rounds=2, seed=4, classifier=load_classifier())
    expected = evaluate(model.sample(6, sampler="euler", steps=1, seed=4), torch.zeros(6), load_classifier())
    assert found.quality == pytest.approx(expected, rel=1e-3)
    (found,) = measure([Plan("m", model, "euler", 1)], batch_size=3, rounds=2)
    assert found.quality is None
    assert (found.model, found.sampler, found.steps) == ("m", "euler", 1)


def test_each_plan_is_warmed_up_and_then_measured_in_turn(monkeypatch):
    """The median of a plan's times; a slow moment falls on all plans alike."""
    calls, now = [], [0.0]

    class Model:
        num_classes, device, unet = None, torch.device("cpu"), torch.nn.Identity()

        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def sample(self, count, *, sampler, steps, seed=0, first_sample=0):
            calls.append((self.name, count, sampler, steps, seed, first_sample))
            now[0] += next(self.seconds)
            return torch.zeros(count, 1, 8, 8)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(latency, "SHORT", 7.5)
    plans = [
        Plan("a", Model("a", [9, 7, 8, 4, 1, 2]), "heun", 5),
        Plan("b", Model("b", [5, 7, 7, 50, 8, 50, 16, 50, 12]), "euler", 2),
    ]
    first, second = measure(plans, batch_size=6, rounds=3, seed=7)
    assert calls[:2] == [("a", 6, "heun", 5, 7, 0), ("b", 6, "euler", 2, 7, 0)]  # the first
    assert calls[2:4] == [("a", 1, "heun", 5, 0, 0), ("b", 1, "euler", 2, 0, 0)]  # counted
    assert calls[4:6] == [("a", 6, "heun", 5, 7, 0), ("b", 6, "euler", 2, 7, 0)]
    # The batches of b are short: one is drawn before each that is timed.
    assert calls[6:] == [
        (name, 6, *rest, 7, n)
        for n in (0, 6, 12)
        for name, *rest in (("a", "heun", 5), ("b", "euler", 2), ("b", "euler", 2))
    ]
    assert (first.seconds, first.fastest, first.slowest, first.samples_per_second) == (2, 1, 4, 3)
    assert (first.first, first.rounds, first.batch_size) == (9, (4, 1, 2), 6)
    assert second.first == 5
    assert (second.seconds, second.fastest, second.slowest, second.samples_per_second) == (12, 8, 16, 0.5)


def test_the_time_in_a_decoder(monkeypatch):
    now = [0.0]

    def takes(seconds, value):
        now[0] += next(seconds)
        return value

    seconds = iter([9, 1, 9, 2, 3, 4]), iter([5, 5, 20, 10, 30])
    zeros = torch.zeros(1, 1, 8, 8)
    model = types.SimpleNamespace(num_classes=None, device=torch.device("cpu"), unet=torch.nn.Identity())
    model.sample = lambda *arguments, **options: takes(seconds[0], zeros)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    plan = Plan("m", model, "multistep", 1, decoder=lambda latents: takes(seconds[1], 2 * latents))
    (row,) = measure([plan], batch_size=1, rounds=3)
    assert row.first == 14
    assert row.rounds == (22, 13, 34)
    assert (row.seconds, row.decoding) == (22, 20)
    (table,) = latency_report.tables([row])
    assert [cell for column in table.columns if "decoder" in column.header for cell in column.cells] == ["20000 (91%)"]


def test_the_clock_waits_for_a_gpu(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr("time.perf_counter", lambda: events.append("clock") or 0.0)
    model = types.SimpleNamespace(device=torch.device("cuda"), sample=lambda *args, **options: events.append("sample"))
    latency._timed(Plan("m", model, "heun", 3), 1, 0, 0)
    assert events == ["wait", "clock", "sample", "wait", "clock"]


def test_latency_refuses_wrong_samples():
    model = ConsistencyModel(tiny_unet(), EDM())
    torch.nn.init.constant_(model.unet.out[2].bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        measure([Plan("m", model, "euler", 2)], batch_size=1, rounds=1)


def test_one_sample_has_no_quality():
    model = ConsistencyModel(tiny_unet(), EDM())
    (found,) = measure([Plan("m", model, "euler", 1)], batch_size=1, rounds=1, classifier=load_classifier())
    assert found.quality is None
    assert found.rounds


@pytest.mark.parametrize(("done", "rounds"), [(3, [2, 1]), (4, [2, 2]), (1, [1]), (0, None)])
def test_an_interruption_keeps_the_rounds_that_were_done(monkeypatch, done, rounds):
    monkeypatch.setattr(latency, "SHORT", 0.0)  # each batch is drawn once
    model = ConsistencyModel(tiny_unet(), EDM())
    sample, calls = model.sample, []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) > 6 + done:  # two first batches, two to count evaluations, two more
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    model.sample = interrupted
    plans = [Plan("a", model, "euler", 1), Plan("b", model, "euler", 2)]
    options = {"batch_size": 2, "rounds": 3, "classifier": load_classifier()}
    if rounds is None:
        with pytest.raises(KeyboardInterrupt):
            measure(plans, **options)
    else:
        assert [len(found.rounds) for found in measure(plans, **options)] == rounds


def test_an_interruption_while_samples_come_to_the_host(monkeypatch):
    """A batch is done with all of it, or not at all."""
    model = ConsistencyModel(tiny_unet(), EDM())
    classifier, to_host, calls = load_classifier(), torch.Tensor.cpu, []

    def interrupted(tensor):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return to_host(tensor)

    plans = [Plan("a", model, "euler", 1), Plan("b", model, "euler", 2)]
    monkeypatch.setattr(torch.Tensor, "cpu", interrupted)
    found = measure(plans, batch_size=2, rounds=3, classifier=classifier)
    assert [len(row.rounds) for row in found] == [2, 1]
    assert all(row.quality is not None for row in found)


def row(seconds, accuracy, to_test, to_train):
    return Latency("m", "heun", 5, 9, seconds, seconds, seconds, 1 / seconds, Quality(accuracy, to_test, to_train))


def test_equal_quality_is_the_fastest_that_is_as_good():
    baselines = [row(1.0, 0.9, 0.3, 0.1), row(3.0, 0.99, 0.3, 0.1), row(2.0, 0.99, 0.35, 0.2), row(1.5, 1.0, 0.5, 0.1)]
    assert equal_quality(row(0.1, 0.99, 0.4, 0.2), baselines) is baselines[2]
    assert equal_quality(row(0.1, 0.99, 0.4, 0.05), baselines) is None
    assert equal_quality(dataclasses.replace(row(0.1, 0.99, 0.4, 0.2), quality=None), baselines) is None
    assert equal_quality(row(0.1, 0.99, 0.4, 0.2), [dataclasses.replace(baselines[0], quality=None)]) is None


@pytest.mark.parametrize(
    ("quality", "as_good"),
    [
        ((0.75, 0.25, 0.125), True),  # the same
        ((0.745, 0.25, 0.125), True),  # half a percent less
        ((0.744, 0.25, 0.125), False),
        ((0.71, 0.25, 0.125), False),
        ((0.75, 0.26, 0.125), False),
        ((0.75, 0.25, 0.126), False),
        ((1.0, 0.1, 0.1), True),
    ],
)
def test_as_good_is_half_a_percent_of_accuracy_and_no_farther(quality, as_good):
    baseline = row(1.0, *quality)
    assert equal_quality(row(0.1, 0.75, 0.25, 0.125), [baseline]) is (baseline if as_good else None)


def test_rounds_do_not_pay_for_the_count_of_evaluations(monkeypatch):
    """A hook that comes and goes makes an accelerated network ready again: that is outside the rounds."""
    from cmfast import accelerate
    from cmfast.engine.accelerator import Accelerator

    model, events = accelerate(ConsistencyModel(tiny_unet(), EDM())), []
    make, timed = Accelerator._make, latency._timed
    monkeypatch.setattr(Accelerator, "_make", lambda *arguments: events.append("make") or make(*arguments))
    monkeypatch.setattr(latency, "_timed", lambda *arguments: events.append("timed") or timed(*arguments))
    measure([Plan("m", model, "multistep", 1), Plan("m", model, "multistep", 2)], batch_size=2, rounds=2)
    assert events[-4:] == ["timed"] * 4
    assert events[:4] == ["timed", "make", "timed", "make"]  # of them the second finds ready what the first has made
