"""The counter-based noise: Philox's published answers, the rule written a second time, and what makes noise good."""

import itertools
import math

import numpy as np
import pytest
import torch
from cmfast.kernels import consistency_step
from cmfast.kernels.reference.philox import gaussian, philox4x32

from cmfast.noise import GaussianNoise
from cmfast.noise import gaussian as noise

from .backends import served
from .tolerance import assert_as_accurate

# counter, key, output: the known answers of philox4x32-10 in the Random123 distribution (kat_vectors)
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = (0, 1, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63, 2**64 - 1)


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    actual = philox4x32(torch.tensor(words(counter)).unbind(), torch.tensor(words(key)).unbind())
    assert [int(word) for word in actual] == words(output)


def independent_words(block, draw, seed, sample):
    """The four words of one block, in Python integers, from the statement of the rule."""
    counter = [block, draw, seed >> 32, 0]
    key = [seed & 0xFFFFFFFF, sample]
    for i in range(10):
        if i:
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second % 2**32,
            (first >> 32) ^ counter[3] ^ key[1],
            first % 2**32,
        ]
    return counter


def independent_noise(shape, seed, draw, first_sample):
    """The noise by numpy, one element at a time."""
    out = np.empty((shape[0], math.prod(shape[1:])))
    for n, e in np.ndindex(out.shape):
        r = independent_words(e // 4, draw, seed, first_sample + n)
        pair = r[:2] if e % 4 < 2 else r[2:]
        u1, u2 = ((2 * (word >> 9) + 1) * 2.0**-24 for word in pair)
        turn = np.cos if e % 2 == 0 else np.sin
        out[n, e] = np.sqrt(-2 * np.log(u1)) * turn(2 * np.pi * u2)
    return torch.from_numpy(out.reshape(shape))


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("shape", "draw", "first_sample"), [((2, 3, 5, 4), 3, 7), ((1, 7), 2**32 - 1, 2**32 - 1)])
def test_rule(shape, draw, first_sample, seed, backend):
    expected = independent_noise(shape, seed, draw, first_sample)
    actual = noise(shape, seed, draw, first_sample, backend=backend)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", served("consistency_step"))
def test_does_not_depend_on_the_batch(backend):
    whole = noise((5, 3, 4, 4), 11, 2, 3, backend=backend)
    assert torch.equal(noise((2, 3, 4, 4), 11, 2, 5, backend=backend), whole[2:4])
    assert torch.equal(noise((1, 3, 4, 4), 11, 2, 7, backend=backend), whole[4:])


@pytest.mark.parametrize("backend", served("consistency_step"))
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 8), (2, 3, 5, 5), (1, 16, 8, 8), (1, 70, 2, 2), (2, 2, 3, 4, 3), (2, 1, 6, 6)]
)
def test_does_not_depend_on_the_memory_format(shape, backend):
    x = torch.zeros(shape)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    reversed_dims = x.permute(*range(x.ndim - 1, -1, -1)).contiguous().permute(*range(x.ndim - 1, -1, -1))
    expected = noise(shape, 5, 1, backend=backend)
    for like in (last, reversed_dims):
        step = consistency_step(like, like, 0.0, 0.0, alpha=0.0, beta=1.0, seed=5, draw=1, backend=backend)
        assert torch.equal(step.sample, expected)


def test_the_samplers_noise_is_the_same():
    like = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(GaussianNoise(5, first_sample=3)(like, 2), noise(like.shape, 5, 2, 3, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def draws():
    """Noise [draw, sample, element]: 6 draws of 16 samples of 4,096."""
    return torch.stack([gaussian((16, 4096), 2024, draw, 0, "cpu") for draw in range(6)]).double()


def test_moments(draws):
    z = draws.flatten()
    n = z.numel()
    # The k-th moment of n normals has variance (E z²ᵏ − (E zᵏ)²)/n: five standard deviations.
    for k, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(z.pow(k).mean() - expected) < 5 * math.sqrt(variance / n), k


def test_distribution(draws):
    for z in (draws.flatten(), *draws[:, :, :].flatten(1), *draws.flatten(0, 1)[:8]):
        below = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
        steps = torch.arange(1, z.numel() + 1) / z.numel()
        distance = torch.maximum((steps - below).abs(), (steps - 1 / z.numel() - below).abs()).max()
        assert distance * math.sqrt(z.numel()) < 1.95  # Kolmogorov's distribution beyond 1.95: 0.001


def test_tails():
    assert gaussian((64, 16384), 1, 0, 0, "cpu").abs().max() > 4.5
    # The smallest u is 2⁻²⁴: no normal lies beyond √(48 ln 2).
    assert gaussian((64, 16384), 1, 0, 0, "cpu").abs().max() <= math.sqrt(48 * math.log(2))


def correlations(rows):
    """Correlation of each pair of rows [R, n], in standard deviations."""
    rows = rows - rows.mean(1, keepdim=True)
    matrix = (rows @ rows.T) / rows.shape[1]
    first, second = zip(*itertools.combinations(range(len(rows)), 2), strict=True)
    return matrix[list(first), list(second)] * math.sqrt(rows.shape[1])


def test_samples_and_draws_are_independent(draws):
    rows = draws.flatten(0, 1)
    assert correlations(rows).abs().max() < 5
    assert correlations(rows.square() - 1).abs().max() < 5 * 2  # z² has variance 2


def test_seeds_are_independent():
    rows = torch.stack([gaussian((1, 4096), seed, 0, 0, "cpu")[0].double() for seed in (*SEEDS, *range(2, 20))])
    assert correlations(rows).abs().max() < 5


def test_elements_are_independent(draws):
    z = draws.flatten(0, 1)
    for lag in (1, 2, 3, 4, 8, 64, 256):
        product = (z[:, lag:] * z[:, :-lag]).flatten()
        assert abs(product.mean()) < 5 / math.sqrt(product.numel()), lag
    # radius and angle of a pair come from different words
    x, y = z[:, ::2], z[:, 1::2]
    radius, angle = (x.square() + y.square()).flatten(), torch.atan2(y, x).flatten()
    assert abs(torch.corrcoef(torch.stack((radius, angle)))[0, 1]) < 5 / math.sqrt(radius.numel())


# Triton's generator by itself.

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _words_kernel(counter, output, draw, seed_high, key_0, key_1, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    block = tl.load(counter + lane).to(tl.uint32)
    high, draw = seed_high.to(tl.uint32), draw.to(tl.uint32)
    r0, r1, r2, r3 = _philox(block, draw, high, key_0.to(tl.uint32), key_1.to(tl.uint32))
    tl.store(output + lane, r0.to(tl.int64))
    tl.store(output + SIZE + lane, r1.to(tl.int64))
    tl.store(output + 2 * SIZE + lane, r2.to(tl.int64))
    tl.store(output + 3 * SIZE + lane, r3.to(tl.int64))


@triton.jit
def _box_muller_kernel(word_1, word_2, output, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    first, second = _box_muller(tl.load(word_1 + lane).to(tl.uint32), tl.load(word_2 + lane).to(tl.uint32))
    tl.store(output + lane, first)
    tl.store(output + SIZE + lane, second)


from cmfast.kernels.triton.consistency import _box_muller, _philox  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("draw", "sample"), [(0, 0), (1, 1), (2**31, 2**31), (2**32 - 1, 2**32 - 1)])
def test_tritons_words_are_the_references(seed, draw, sample):
    block = torch.tensor([0, 1, 2, 16, 2**16 + 1, 2**31 - 1, 2**31, 2**32 - 1], device=DEVICE)
    output = torch.zeros(4, 8, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](block, output, draw, seed >> 32, seed & 0xFFFFFFFF, sample, SIZE=8)
    key = torch.tensor((seed & 0xFFFFFFFF, sample)).unbind()
    expected = philox4x32((block.cpu(), *torch.tensor((draw, seed >> 32, 0)).unbind()), key)
    assert torch.equal(output.cpu(), torch.stack(expected))


def test_tritons_normals_are_exact_to_rounding():
    g = torch.Generator().manual_seed(0)
    size = 1 << 15
    pair = torch.randint(0, 2**32, (2, size), generator=g)
    ends = torch.tensor([0, 2**9 - 1, 2**9, 2**30, 2**31 - 1, 2**31, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 1])
    pair[0, :81], pair[1, :81] = ends.repeat_interleave(9), ends.repeat(9)
    output = torch.full((2, size), math.nan, device=DEVICE)
    _box_muller_kernel[(1,)](pair[0].to(DEVICE), pair[1].to(DEVICE), output, SIZE=size)
    u1, u2 = (2 * (pair >> 9) + 1).double() * 2.0**-24
    single, angle = torch.sqrt(-2 * torch.log(u1.float())), 2 * math.pi * u2.float()
    exact = torch.sqrt(-2 * torch.log(u1)) * torch.stack(((2 * math.pi * u2).cos(), (2 * math.pi * u2).sin()))
    plain = torch.stack((single * angle.cos(), single * angle.sin()))
    assert_as_accurate("normals", output.cpu(), exact, plain)
    assert ((output.cpu() - exact).abs() / exact.abs()).max() < 1e-6
