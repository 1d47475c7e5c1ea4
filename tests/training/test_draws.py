import math

import pytest
import torch

from cmfast.noise import gaussian
from cmfast.training import Dataset
from cmfast.training.batches import Batches
from cmfast.training.draws import Purpose, UpdateDraws, flips, module_seed, order, words

from .tiny import data


@pytest.mark.parametrize("like", [torch.empty(6), torch.empty(6, 3), torch.empty(6, 2, 3, 3)], ids=["N", "NC", "NCHW"])
def test_a_sample_has_its_numbers_however_the_batch_is_divided(like):
    whole = UpdateDraws(5, 7)
    expected = [whole.normal(like), whole.uniform(like), whole.normal(like)]
    assert not torch.equal(expected[0], expected[2])
    for first, count in ((0, 2), (2, 4)):
        part = UpdateDraws(5, 7, first)
        piece = like[first : first + count]
        found = [part.normal(piece), part.uniform(piece), part.normal(piece)]
        assert all(torch.equal(f, e[first : first + count]) for f, e in zip(found, expected, strict=True))
    for other in (UpdateDraws(6, 7), UpdateDraws(5, 8)):
        assert not torch.equal(other.normal(like), expected[0])


def test_uniform_numbers_are_uniform():
    numbers = UpdateDraws(0, 0).uniform(torch.empty(4000, 50)).flatten().double()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    count = len(numbers)
    ordered = numbers.sort().values
    distance = (ordered - torch.arange(count) / count).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.63 / math.sqrt(count)  # exceeded by one of a hundred uniform samples; the seed is fixed


def test_uniform_numbers_are_below_one_in_every_dtype():
    draws = UpdateDraws(0, 0)
    draws._normal = lambda like, dtype: torch.full(like.shape, 6.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        number = draws.uniform(torch.empty(1, dtype=dtype))
        assert number.dtype == dtype
        assert 0.99 < number.item() < 1


def test_training_does_not_draw_the_noise_of_sampling():
    like = torch.empty(3, 1, 4, 4)
    for draw in (0, 1):
        assert not torch.equal(UpdateDraws(9, draw).normal(like), gaussian(like.shape, 9, draw))


def test_orders_are_permutations():
    first, second = order(3, 0, 1000), order(3, 1, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert not torch.equal(first, second)
    assert not torch.equal(first, order(4, 0, 1000))
    ranks = first.double() - 499.5
    assert abs((ranks * (torch.arange(1000) - 499.5)).sum() / (ranks**2).sum()) < 0.1  # not nearly sorted


def test_words_differ_by_what_they_are_for():
    indices = torch.arange(50)
    found = torch.stack([words(1, purpose, 2, indices)[0] for purpose in Purpose])
    assert len(found.unique()) == found.numel()
    assert 0 < flips(1, 2, 0, 1000).sum() - 430 < 140
    assert torch.equal(flips(1, 2, 3, 5), flips(1, 2, 0, 8)[3:])
    seeds = {module_seed(seed, i, part) for seed in (0, 1) for i in (0, 1) for part in (0, 1)}
    assert len(seeds) == 8
    first, second = words(1, Purpose.MODULES, 2, torch.tensor(3))
    assert module_seed(1, 2, 3) == int(first << 31 | second >> 1)


def test_an_epoch_goes_through_the_data():
    batches = Batches(data(11), 4, seed=0)
    drawn = [batches.indices(i) for i in range(4)]
    assert all(len(indices) == 4 for indices in drawn)
    assert len({*drawn[0].tolist(), *drawn[1].tolist()}) == 8  # the three that are left wait for the next epoch
    assert not torch.equal(drawn[0], drawn[2])
    again = Batches(data(11), 4, seed=0)
    assert torch.equal(again.indices(3), drawn[3])  # of the number alone
    assert torch.equal(again.indices(0), drawn[0])
    images, labels = batches.part(1)
    assert torch.equal(images, data(11).images[drawn[1]])
    assert torch.equal(labels, data(11).labels[drawn[1]])
    assert torch.equal(batches.part(1, 2, 1)[0], images[2:3])
    for size in (0, 12):
        with pytest.raises(ValueError, match=f"1 … 11, the data's length, got {size}"):
            Batches(data(11), size, seed=0)


def test_bytes_are_scaled_and_images_mirrored():
    pixels = torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8).reshape(2, 1, 1, 2)
    source = Dataset(pixels.repeat(50, 1, 1, 1), torch.zeros(100, dtype=torch.int64))
    plain, mirrored = (Batches(source, 100, 0, horizontal_flip=flip).part(0)[0] for flip in (False, True))
    assert sorted(set(plain.flatten().tolist())) == pytest.approx([-1.0, -0.6, 0.6, 1.0])
    flipped = flips(0, 0, 0, 100)
    assert torch.equal(mirrored[flipped], plain[flipped].flip(-1))
    assert torch.equal(mirrored[~flipped], plain[~flipped])
    assert torch.equal(Batches(source, 100, 0, horizontal_flip=True).part(0, 30, 20)[0], mirrored[30:50])
