"""Drum hits, synthesised as drum machines do it: oscillators whose pitch falls, filtered noise, decays."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...sound import Mdct
from .dataset import Dataset

#: How the hits are sampled: 0.512 s.
SAMPLE_RATE, LENGTH = 16000, 8192

#: What the models of the drums draw, and how waveforms are made of it.
REPRESENTATION = Mdct(sample_rate=SAMPLE_RATE, bands=16, peak=4.0, exponent=0.5)


def load_drums(hits: int = 500, test_hits: int = 100, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hits of the classes of `CLASSES` as (training, test) sets, in the form of `REPRESENTATION`: [M, 16, 512].

    Args:
        hits: of each class, in the training set.
        test_hits: of each class, in the test set.
        seed: of pitches, decays, colours of noise and loudness.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = (_hits(count, generator) for count in (hits, test_hits))
    return train, test


def _hits(count: int, generator: torch.Generator) -> Dataset:
    waves = [synthesise(name, count, generator) for name in CLASSES]
    labels = torch.arange(len(waves)).repeat_interleave(count)
    return Dataset(REPRESENTATION.encode(torch.cat(waves)), labels, tuple(CLASSES))


def synthesise(name: str, count: int, generator: torch.Generator) -> Tensor:
    """Different hits of one class [count, 1, LENGTH], float32, peaks between 0.5 and 0.95.

    Raises:
        ValueError: there is no such class.
    """
    if name not in CLASSES:
        raise ValueError(f"unknown drum {name!r}: choose one of {', '.join(CLASSES)}")
    wave = CLASSES[name](_Draws(count, generator))
    fade = torch.linspace(0.0, math.pi / 2, LENGTH // 16, dtype=torch.float64).cos().square()
    wave[:, -len(fade) :] *= fade  # what has not decayed by then
    loudness = _Draws(count, generator).between(0.5, 0.95)
    return (wave * loudness / wave.abs().amax(1, keepdim=True)).float()[:, None]


class _Draws:
    """Random numbers and signals of `count` hits, float64: columns [count, 1] and signals [count, LENGTH]."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.t = torch.arange(LENGTH, dtype=torch.float64) / SAMPLE_RATE  # seconds

    def between(self, low: float, high: float) -> Tensor:
        """Numbers between the two, evenly by their logarithms."""
        u = torch.rand((self.count, 1), generator=self.generator, dtype=torch.float64)
        return low * (high / low) ** u

    def noise(self, low: Tensor, high: Tensor) -> Tensor:
        """Noise between two frequencies in Hz [count, 1], of unit variance; it falls by 12 dB an octave outside."""
        white = torch.randn((self.count, LENGTH), generator=self.generator, dtype=torch.float64)
        f = torch.fft.rfftfreq(LENGTH, 1.0 / SAMPLE_RATE, dtype=torch.float64).clamp(min=1.0)
        gain = 1.0 / ((1.0 + (low / f) ** 4) * (1.0 + (f / high) ** 4)).sqrt()
        coloured = torch.fft.irfft(torch.fft.rfft(white) * gain, LENGTH)
        return coloured / coloured.std(1, keepdim=True)

    def tone(self, frequency: Tensor, sweep: Tensor | float = 0.0, sweep_seconds: Tensor | float = 1.0) -> Tensor:
        """A sine from phase 0 whose frequency [count, 1] in Hz is `sweep` times higher at first, and then falls."""
        fallen = self.t + sweep * sweep_seconds * (1.0 - torch.exp(-self.t / sweep_seconds))
        return torch.sin(2.0 * math.pi * frequency * fallen)

    def square(self, frequency: Tensor) -> Tensor:
        """A square wave of a frequency [count, 1] in Hz, of the harmonics below half the sampling rate."""
        wave = torch.zeros((self.count, LENGTH), dtype=torch.float64)
        for harmonic in range(1, int(SAMPLE_RATE / 2 / frequency.min().item()) + 1, 2):
            audible = (harmonic * frequency < SAMPLE_RATE / 2).double()
            wave += audible * self.tone(harmonic * frequency) / harmonic
        return wave

    def decay(self, seconds: Tensor) -> Tensor:
        """Falls by the factor e in so many seconds [count, 1]."""
        return torch.exp(-self.t / seconds)


def _kick(d: _Draws) -> Tensor:
    body = d.tone(d.between(42.0, 65.0), d.between(2.0, 5.0), d.between(0.012, 0.03)) * d.decay(d.between(0.08, 0.2))
    click = d.noise(d.between(500.0, 1500.0), d.between(3000.0, 6000.0)) * d.decay(d.between(0.001, 0.003))
    return body + d.between(0.02, 0.2) * click


def _snare(d: _Draws) -> Tensor:
    pitch = d.between(160.0, 230.0)
    skin = (d.tone(pitch, 0.3, 0.01) + 0.6 * d.tone(1.6 * pitch)) * d.decay(d.between(0.03, 0.08))
    wires = d.noise(d.between(800.0, 2500.0), d.between(5000.0, 9000.0)) * d.decay(d.between(0.05, 0.14))
    return skin + d.between(0.3, 0.8) * wires


def _hat(d: _Draws, seconds: Tensor) -> Tensor:
    pitch = d.between(0.85, 1.2)
    metal = torch.zeros((d.count, LENGTH), dtype=torch.float64)
    for f in (205.3, 304.4, 369.6, 522.7, 540.0, 800.0):  # square waves, whose aliases are no harm here
        metal += d.tone(pitch * f).sign()
    spectrum = torch.fft.rfft(metal)
    f = torch.fft.rfftfreq(LENGTH, 1.0 / SAMPLE_RATE, dtype=torch.float64).clamp(min=1.0)
    metal = torch.fft.irfft(spectrum / (1.0 + (d.between(4500.0, 6500.0) / f) ** 8).sqrt(), LENGTH)
    metal = metal / metal.std(1, keepdim=True)
    hiss = d.noise(d.between(4500.0, 6500.0), d.between(8000.0, 16000.0))
    return (metal + d.between(0.5, 2.0) * hiss) * d.decay(seconds)


def _closed_hat(d: _Draws) -> Tensor:
    return _hat(d, d.between(0.012, 0.035))


def _open_hat(d: _Draws) -> Tensor:
    return _hat(d, d.between(0.12, 0.3))


def _tom(d: _Draws) -> Tensor:
    pitch = d.between(85.0, 200.0)
    body = d.tone(pitch, d.between(0.2, 0.6), d.between(0.03, 0.08)) * d.decay(d.between(0.1, 0.22))
    stick = d.noise(d.between(300.0, 600.0), d.between(1500.0, 3000.0)) * d.decay(d.between(0.005, 0.015))
    return body + d.between(0.03, 0.12) * stick


def _clap(d: _Draws) -> Tensor:
    gap = d.between(0.008, 0.013)
    since = torch.where(d.t < 3.0 * gap, d.t.remainder(gap), d.t - 3.0 * gap)
    envelope = torch.where(d.t < 3.0 * gap, torch.exp(-since / 0.004), torch.exp(-since / d.between(0.04, 0.1)))
    return d.noise(d.between(700.0, 1100.0), d.between(1400.0, 2600.0)) * envelope


def _cowbell(d: _Draws) -> Tensor:
    pitch = d.between(0.85, 1.2)
    plates = d.square(540.0 * pitch) + d.square(800.0 * pitch * d.between(0.98, 1.02))
    return plates * (0.6 * d.decay(d.between(0.01, 0.02)) + 0.4 * d.decay(d.between(0.08, 0.2)))


def _rim(d: _Draws) -> Tensor:
    pitch = d.between(0.85, 1.2)
    stick = d.tone(1720.0 * pitch) + 0.7 * d.tone(460.0 * pitch)
    return (stick + d.between(0.05, 0.3) * d.noise(d.between(1e3, 2e3), d.between(4e3, 8e3))) * d.decay(
        d.between(0.006, 0.015)
    )


#: How a class is synthesised; a class's number is its place.
CLASSES: dict[str, Callable[[_Draws], Tensor]] = {
    "kick": _kick,
    "snare": _snare,
    "closed hi-hat": _closed_hat,
    "open hi-hat": _open_hat,
    "tom": _tom,
    "clap": _clap,
    "cowbell": _cowbell,
    "rim shot": _rim,
}
