import math
import wave

import numpy as np
import pytest
import torch

import cmfast
from cmfast import ConsistencyModel, UNet, UNetConfig, sound
from cmfast.checkpoints import CheckpointError
from cmfast.sound import Mdct, save_wav
from cmfast.training.methods.conversion import consistency_from

PLAIN = Mdct(sample_rate=8000, bands=16, peak=1.0, exponent=1.0)


def waves(length=320, count=3, dtype=torch.float64):
    return torch.randn(count, 1, length, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(("bands", "length"), [(16, 320), (64, 64), (2, 6)])
def test_nothing_is_lost(bands, length, exponent):
    mdct = Mdct(8000, bands, 3.0, exponent)
    x = waves(length)
    samples = mdct.encode(x)
    assert samples.shape == (3, bands, length // bands)
    torch.testing.assert_close(mdct.decode(samples), x, rtol=0, atol=1e-12)
    narrow = mdct.decode(mdct.encode(x.float()))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), x, rtol=0, atol=2e-5)
    zero = torch.zeros_like(x)
    assert torch.equal(mdct.decode(mdct.encode(zero)), zero)


def test_it_is_the_mdct():
    """Blocks of 2M values under a sine window, each by M cosines (Princen, Johnson and Bradley 1987), but the ends."""
    m, x = 16, waves()
    n, k = torch.arange(2 * m, dtype=torch.float64), torch.arange(m, dtype=torch.float64)
    window = torch.sin(math.pi / (2 * m) * (n + 0.5))
    basis = math.sqrt(2 / m) * torch.cos(math.pi / m * (n[:, None] + 0.5 - m / 2) * (k + 0.5)) * window[:, None]
    blocks = x[:, 0, m // 2 : -m // 2].unfold(1, 2 * m, m)  # each begins half a block before its position
    expected = (blocks @ basis).transpose(1, 2)
    torch.testing.assert_close(PLAIN.encode(x)[:, :, 1:-1], expected, rtol=0, atol=1e-12)


def test_it_is_orthogonal():
    columns = PLAIN.encode(torch.eye(64, dtype=torch.float64)[:, None]).flatten(1)
    torch.testing.assert_close(columns @ columns.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_tone_is_in_its_band():
    t = torch.arange(1024, dtype=torch.float64) / 8000
    for frequency in (600.0, 2100.0, 3900.0):  # 250 Hz a band
        energy = PLAIN.encode(torch.sin(2 * math.pi * frequency * t)[None, None])[0].square().sum(1)
        assert energy.argmax() == frequency // 250
        assert energy.max() > 0.6 * energy.sum()


def test_amplitudes_are_compressed():
    x = waves()
    c = PLAIN.encode(x)
    torch.testing.assert_close(Mdct(8000, 16, 4.0, 0.5).encode(x), c.sign() * (c.abs() / 4).sqrt())


def test_what_is_no_transform():
    for changes in (
        {"bands": 3},
        {"bands": 0},
        {"sample_rate": 0},
        {"peak": 0.0},
        {"exponent": 0.0},
        {"exponent": 1.5},
    ):
        with pytest.raises(ValueError, match="Mdct: expected"):
            Mdct(**{"sample_rate": 8000, **changes})
    for shape in ((1, 1, 17), (1, 2, 16), (1, 16), (1, 1, 0)):
        with pytest.raises(ValueError, match=r"a multiple of 16\], got"):
            PLAIN.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected \[N, 16, T\], got \[1, 8, 4\]"):
        PLAIN.decode(torch.zeros(1, 8, 4))


def sound_model():
    torch.manual_seed(0)
    config = UNetConfig(8, 16, 16, 32, (1,), 1, dims=1)
    return ConsistencyModel(UNet(config), representation=PLAIN)


def test_models_say_how_their_samples_are_heard(tmp_path):
    model = sound_model()
    model.save(tmp_path / "a")
    assert cmfast.load(tmp_path / "a").representation == PLAIN
    assert consistency_from(model).representation == PLAIN
    assert cmfast.accelerate(model).representation == PLAIN
    assert cmfast.load("digits").representation is None
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"Mdct"', '"Mp3"'))
    with pytest.raises(CheckpointError, match="representation 'Mp3': expected Mdct"):
        cmfast.load(tmp_path / "a")
    with pytest.raises(ValueError, match="cannot say how waveforms are made"):
        cmfast.checkpoints.write(model.checkpoint(), tmp_path / "a.pt", "openai")


def test_sounds_follow_each_other_in_a_wav(tmp_path):
    x = torch.tensor([[0.0, 0.5, 2.0], [-1.0, -3.0, 1.0]])[:, None]
    save_wav(x, tmp_path / "a.wav", 1000, pause=0.002)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 1000, 8)
        values = np.frombuffer(file.readframes(8), "<i2")
    assert values.tolist() == [0, 16384, 32767, 0, 0, -32767, -32767, 32767]
    with pytest.raises(ValueError, match=r"expected sounds \[N, 1, L\], got \[2, 2, 3\]"):
        save_wav(torch.zeros(2, 2, 3), tmp_path / "b.wav", 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_what_inference_mode_has_made_serves_gradients():
    sound._dct4.cache_clear()
    with torch.inference_mode():
        PLAIN.encode(waves())
    x = waves().requires_grad_()
    PLAIN.encode(x).sum().backward()
    assert x.grad is not None
