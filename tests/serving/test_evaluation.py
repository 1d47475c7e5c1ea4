"""A sample of a batch of several requests is the one that it would be alone."""

import itertools

import numpy as np
import pytest
import torch

from cmfast import accelerate, load
from cmfast.noise import GaussianNoise
from cmfast.pictures import to_pixels
from cmfast.serving.batches import Batch, Piece, Plan
from cmfast.serving.evaluation import Evaluator, JoinedNoise

from ..bulk import models

PLANS = [Plan("multistep", (80.0,)), Plan("multistep", (80.0, 0.5)), Plan("heun", (80.0, 1.0, 0.0))]
#: (seed, first sample, labels); the last piece's seed has more bits than an int64 has.
ASKED = [(1, 0, (3,)), (9, 4_000_000_000, (1, 2, 3)), ((1 << 64) - 1, 5, (9, 9))]


def pieces(asked=ASKED, pixels=False):
    return tuple(Piece(i, seed, first, len(labels), labels, pixels) for i, (seed, first, labels) in enumerate(asked))


def alone(model, plan, piece):
    given = {"sampler": plan.sampler, "sigmas": plan.levels, "class_labels": list(piece.labels)}
    return model.sample(piece.count, seed=piece.seed, first_sample=piece.first_sample, **given)


@pytest.fixture(scope="module")
def digits():
    return accelerate(load("digits"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.sampler}-{len(plan.levels)}")
def test_to_the_bit_where_the_model_is_accelerated(digits, plan):
    """Whatever shares the batch, whatever its size and order, and the number of threads."""
    expected = [alone(digits, plan, piece).numpy() for piece in pieces()]
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            evaluate = Evaluator(digits, threads)
            for order in itertools.permutations(range(3), 2):
                for size in (6, 8):
                    batch = Batch(plan, size, tuple(pieces()[i] for i in order))
                    for i, found in zip(order, evaluate(batch), strict=True):
                        np.testing.assert_array_equal(found, expected[i])
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads(digits):
    before = torch.get_num_threads()
    try:
        for threads, expected in ((None, before), (4, 4)):
            Evaluator(digits, threads)(Batch(PLANS[0], 2, pieces()[:1]))
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 4), (2, 16), (1, 3, 4, 4)])
def test_samples_of_any_shape(shape):
    model = models.model(shape)
    evaluate = Evaluator(model, 1)
    evaluate.warm_up((1, 2))
    for plan in PLANS:
        found = evaluate(Batch(plan, 8, pieces()))
        for piece, samples in zip(pieces(), found, strict=True):
            assert samples.dtype == np.float32
            np.testing.assert_array_equal(samples, alone(model, plan, piece).numpy())


def test_pixels_and_models_without_classes():
    model = models.model(classes=None)
    wanted = [Piece(0, 3, 0, 2, None, True), Piece(1, 3, 2, 1, None, False)]
    pixels, numbers = Evaluator(model, 1)(Batch(PLANS[0], 4, tuple(wanted)))
    samples = model.sample(3, seed=3, sigmas=(80.0,))
    np.testing.assert_array_equal(pixels, to_pixels(samples[:2]).numpy())
    np.testing.assert_array_equal(numbers, samples[2:].numpy())


def test_joined_noise():
    like = torch.ones(8, 2, 3, 5).to(memory_format=torch.channels_last)
    noise = JoinedNoise(pieces())(like, 2)
    assert noise.is_contiguous(memory_format=torch.channels_last)
    expected = [GaussianNoise(p.seed, p.first_sample)(torch.zeros(p.count, 2, 3, 5), 2) for p in pieces()]
    torch.testing.assert_close(noise[:6], torch.cat(expected), rtol=0, atol=0)
    assert not noise[6:].any()
