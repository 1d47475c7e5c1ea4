"""Sound: from the samples that a model draws to waveforms and back, and to a file."""

import dataclasses
import functools
import math
import wave
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .files import whole_file
from .finite import check_finite


@dataclasses.dataclass(frozen=True)
class Mdct:
    """The modified discrete cosine transform of a waveform, with amplitudes compressed by a power.

    A waveform [N, 1, L] becomes a sample [N, bands, L / bands]: channels are bands of frequency, each
    sample_rate / 2 / bands Hz wide, positions are blocks of `bands` values. Neighbouring blocks overlap with a sine
    window; at both ends, where there is no neighbour, it is rectangular. The transform is orthogonal: white noise stays
    white noise, and nothing is lost.

        c = DCT-IV of each block, after the values on both sides of each boundary were rotated with their mirror images
        sample = sign(c) · |c / peak|^exponent

    Princen, Johnson and Bradley 1987, "Subband/Transform Coding Using Filter Bank Designs Based on Time Domain Aliasing
    Cancellation"; Malvar 1992, "Signal Processing with Lapped Transforms", for this form of it.

    Attributes:
        sample_rate: of the waveform, in Hz.
        bands: of frequency, an even number.
        peak: the coefficient that is encoded as 1; a full-scale sine has at most about √bands.
        exponent: of the compression, in (0, 1]; 1 is none.
    """

    sample_rate: int
    bands: int = 64
    peak: float = 8.0
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.sample_rate < 1 or self.bands < 2 or self.bands % 2:
            raise ValueError(
                f"Mdct: expected a positive sample_rate and an even number of bands, got {self.sample_rate} and "
                f"{self.bands}"
            )
        if not self.peak > 0.0 or not 0.0 < self.exponent <= 1.0:
            raise ValueError(f"Mdct: expected peak > 0 and exponent in (0, 1], got {self.peak} and {self.exponent}")

    def encode(self, waveform: Tensor) -> Tensor:
        """Waveforms [N, 1, L], L a multiple of the bands, as samples [N, bands, L / bands]; computed in float64.

        Raises:
            ValueError: another shape.
        """
        if waveform.ndim != 3 or waveform.shape[1] != 1 or not waveform.shape[2] or waveform.shape[2] % self.bands:
            raise ValueError(f"Mdct: expected waveforms [N, 1, a multiple of {self.bands}], got {list(waveform.shape)}")
        blocks = waveform.double().reshape(len(waveform), -1, self.bands)
        c = (_folded(blocks) @ _dct4(self.bands).to(blocks.device)).transpose(1, 2)
        return (c.sign() * (c / self.peak).abs() ** self.exponent).to(waveform.dtype)

    def decode(self, samples: Tensor) -> Tensor:
        """Samples [N, bands, T] as waveforms [N, 1, bands · T]: the inverse of `encode`.

        Raises:
            ValueError: another shape.
        """
        if samples.ndim != 3 or samples.shape[1] != self.bands:
            raise ValueError(f"Mdct: expected [N, {self.bands}, T], got {list(samples.shape)}")
        y = samples.double()
        c = self.peak * y.sign() * y.abs() ** (1.0 / self.exponent)
        blocks = _unfolded(c.transpose(1, 2) @ _dct4(self.bands).to(y.device))
        return blocks.reshape(len(samples), 1, -1).to(samples.dtype)


def save_wav(waveforms: Tensor, path: str | Path, sample_rate: int, pause: float = 0.1) -> None:
    """Write sounds [N, 1, L], in [-1, 1], to one WAV file, one after another: 16 bits, one channel.

    Args:
        waveforms: values beyond are clipped.
        path: of the file.
        sample_rate: in Hz.
        pause: seconds of silence between two sounds.

    Raises:
        ValueError: sounds of another shape.
        FloatingPointError: sounds that are not finite.
        OSError: the file cannot be written.
    """
    if waveforms.ndim != 3 or waveforms.shape[1] != 1 or not len(waveforms):
        raise ValueError(f"save_wav: expected sounds [N, 1, L], got {list(waveforms.shape)}")
    check_finite(waveforms)
    silence = round(pause * sample_rate)
    values = F.pad(waveforms[:, 0].float().cpu().clamp(-1.0, 1.0), (0, silence)).flatten()
    values = values[: len(values) - silence]
    with whole_file(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((values * 32767.0).round().to(torch.int16).numpy().astype("<i2").tobytes())


def _folded(blocks: Tensor) -> Tensor:
    """Rotate each value before a boundary of blocks [N, T, M] with its mirror image behind it, as the window says."""
    return _rotated(blocks, 1.0)


def _unfolded(blocks: Tensor) -> Tensor:
    """The inverse of `_folded`: the same angles back."""
    return _rotated(blocks, -1.0)


def _rotated(blocks: Tensor, direction: float) -> Tensor:
    half = blocks.shape[2] // 2
    angle = (torch.arange(half, dtype=blocks.dtype, device=blocks.device) + 0.5) * (math.pi / (4 * half))
    cos, sin = angle.flip(0).cos(), direction * angle.flip(0).sin()  # of distances from the boundary: sin² + cos² = 1
    rotated = blocks.clone()
    before, behind = blocks[:, :-1, half:].flip(2), blocks[:, 1:, :half]  # by distance from the boundary
    rotated[:, :-1, half:] = (cos * before - sin * behind).flip(2)
    rotated[:, 1:, :half] = cos * behind + sin * before
    return rotated


@functools.cache
def _dct4(size: int) -> Tensor:
    """The orthogonal, symmetric DCT-IV [size, size], float64: √(2/M) · cos(π/M · (n + ½)(k + ½))."""
    with torch.inference_mode(False):  # it serves later calls with gradients as well
        n = torch.arange(size, dtype=torch.float64) + 0.5
        return math.sqrt(2.0 / size) * torch.cos(math.pi / size * n[:, None] * n)
