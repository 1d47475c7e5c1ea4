import pytest
import torch

from cmfast.training.data import drums, load_drums


@pytest.fixture(scope="module")
def hits():
    """A few hits of each class [8, 12, LENGTH]."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([drums.synthesise(name, 12, generator)[:, 0] for name in drums.CLASSES])


def test_the_sets_are_encoded_hits():
    train, test = load_drums(hits=3, test_hits=2, seed=4)
    assert train.images.shape == (24, 16, 512)
    assert train.images.dtype == torch.float32
    assert train.labels.tolist() == [i for i in range(8) for _ in range(3)]
    assert test.labels.tolist() == [i for i in range(8) for _ in range(2)]
    assert train.class_names == tuple(drums.CLASSES)
    first = drums.synthesise("kick", 3, torch.Generator().manual_seed(4))
    torch.testing.assert_close(drums.REPRESENTATION.decode(train.images[:3]), first, rtol=0, atol=1e-5)
    again, other = (load_drums(hits=3, test_hits=2, seed=seed)[0].images for seed in (4, 5))
    assert torch.equal(again, train.images)
    assert not torch.equal(other, train.images)
    assert not torch.equal(test.images[:2], train.images[:2])


def test_hits_are_loud_and_differ(hits):
    peaks = hits.abs().amax(2)
    assert (peaks > 0.49).all()
    assert (peaks < 0.951).all()
    assert drums.REPRESENTATION.encode(hits.flatten(0, 1)[:, None]).abs().max() < 1
    assert hits[:, :, -1].abs().max() < 1e-6  # faded out
    for kind in hits:
        apart = torch.cdist(kind, kind) + torch.eye(len(kind)) * 100
        assert apart.min() > 0.5


def test_hits_sound_like_their_names(hits):
    """By the frequency in the middle of the energy, in Hz, and the time in which 95 % of the energy has come."""
    energy = torch.fft.rfft(hits).abs().square().cumsum(2)
    hertz = (energy < 0.5 * energy[..., -1:]).sum(2) * drums.SAMPLE_RATE / drums.LENGTH
    power = hits.square().cumsum(2)
    seconds = (power < 0.95 * power[..., -1:]).sum(2) / drums.SAMPLE_RATE
    pitch, length = (dict(zip(drums.CLASSES, values, strict=True)) for values in (hertz, seconds))
    assert pitch["kick"].median() < 85 < 100 < pitch["tom"].median()
    assert pitch["tom"].max() < 350
    assert pitch["cowbell"].min() > 400
    assert pitch["clap"].min() > 700
    assert min(pitch[name].min() for name in ("closed hi-hat", "open hi-hat")) > 3500
    assert length["closed hi-hat"].max() < 0.08 < 0.12 < length["open hi-hat"].min()
    assert length["rim shot"].max() < 0.04
    assert length["kick"].min() > 0.06


def test_a_drum_that_is_not_there():
    with pytest.raises(ValueError, match="unknown drum 'gong': choose one of kick, snare"):
        drums.synthesise("gong", 1, torch.Generator())
