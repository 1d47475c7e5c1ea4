import pytest
import torch
from cmfast.kernels import BackendError

from cmfast import noise
from cmfast.noise import GaussianNoise


def test_is_a_function_of_seed_draw_and_sample_index():
    whole = noise.gaussian((8, 3, 5, 7), seed=11, draw=2)
    for first in range(8):
        assert torch.equal(noise.gaussian((1, 3, 5, 7), seed=11, draw=2, first_sample=first)[0], whole[first])
    for other in (
        noise.gaussian((8, 3, 5, 7), seed=12, draw=2),
        noise.gaussian((8, 3, 5, 7), seed=11 + (1 << 32), draw=2),
        noise.gaussian((8, 3, 5, 7), seed=11, draw=3),
    ):
        assert (other - whole).abs().min() > 0 or (other == whole).float().mean() < 0.01


def test_a_longer_sample_begins_with_the_shorter():
    assert torch.equal(noise.gaussian((2, 10), seed=0)[:, :7], noise.gaussian((2, 7), seed=0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layout_and_dtype_do_not_change_the_numbers(dtype, memory_format):
    like = torch.empty(3, 4, 5, 6, dtype=dtype).to(memory_format=memory_format)
    z = GaussianNoise(seed=5, first_sample=2)(like, 1)
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=memory_format)
    expected = noise.gaussian((3, 4, 5, 6), seed=5, draw=1, first_sample=2)
    # float64 is the reference's: the same numbers to float32's rounding.
    tolerance = 1e-6 if dtype == torch.float64 else 0
    torch.testing.assert_close(z, expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_moments():
    z = noise.gaussian((64, 3, 32, 32), seed=0).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert 4.0 < z.abs().max() < 5.8


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match="seed must be"):
        noise.gaussian((1, 4), seed=seed)


def test_largest_seed():
    assert torch.isfinite(noise.gaussian((1, 4), seed=(1 << 64) - 1)).all()


def test_what_is_not_said_is_the_first():
    first = noise.gaussian((2, 4), seed=3, draw=0, first_sample=0)
    assert torch.equal(noise.gaussian((2, 4), seed=3), first)
    assert torch.equal(GaussianNoise(3)(torch.empty(2, 4), 0), first)
    assert noise.gaussian((2, 4), seed=3).dtype == torch.float32


def test_a_backend_may_be_asked_for():
    torch.testing.assert_close(noise.gaussian((2, 4), seed=3, backend="reference"), noise.gaussian((2, 4), seed=3))
    with pytest.raises(BackendError, match="unknown backend"):
        noise.gaussian((2, 4), seed=3, backend="fast")


def test_what_it_is_like_is_not_read():
    like = torch.full((2, 4), float("nan"))
    assert torch.equal(GaussianNoise(3)(like, 1), noise.gaussian((2, 4), seed=3, draw=1))


@pytest.mark.parametrize("seed", [3, 2**40 + 1, 2**64 - 1])
def test_seeds_on_the_device(seed):
    on_device = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    expected = noise.gaussian((2, 3, 5), seed, draw=2, first_sample=9)
    assert torch.equal(noise.gaussian((2, 3, 5), on_device, draw=2, first_sample=torch.tensor(9)), expected)
    like = torch.empty(2, 3, 5)
    assert torch.equal(GaussianNoise(on_device, torch.tensor(9))(like, 2), expected)
    with pytest.raises(ValueError, match=r"seed must be an integer, or an int64 tensor .* got \[1\] torch.int32"):
        GaussianNoise(on_device.int())(like, 2)
