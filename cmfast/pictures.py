"""Samples as pictures, moving ones too, and pictures as samples."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .files import whole_file
from .finite import check_finite

_MIN_CELL = 64  # pixels


def grid(samples: Tensor, columns: int | None = None, margin: int = 2, smallest: int = _MIN_CELL) -> np.ndarray:
    """Lay samples out as one picture [height, width, 3], uint8.

    Args:
        samples: images [N, C, H, W] or videos [N, C, D, H, W] (a row of frames each), C 1 or 3, in [-1, 1]; values
            beyond are clipped. Or their pixels, uint8.
        columns: samples a row; None makes about a square (one column for videos).
        margin: pixels between samples.
        smallest: samples of fewer pixels are enlarged by a whole factor.

    Raises:
        ValueError: samples of another shape.
    """
    if samples.ndim not in (4, 5) or samples.shape[1] not in (1, 3) or not len(samples):
        raise ValueError(f"grid: expected samples [N, 1 or 3, H, W] or [N, 1 or 3, D, H, W], got {list(samples.shape)}")
    if samples.ndim == 5:  # frames side by side
        samples, columns = samples.movedim(2, 3).flatten(3), columns or 1
    n, _, h, w = samples.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows, factor = -(-n // columns), max(1, -(-smallest // min(h, w)))
    pixels = (
        (samples if samples.dtype == torch.uint8 else to_pixels(samples))
        .cpu()
        .expand(n, 3, h, w)
        .repeat_interleave(factor, 2)
        .repeat_interleave(factor, 3)
    )
    h, w = h * factor, w * factor
    picture = torch.full((rows * (h + margin) + margin, columns * (w + margin) + margin, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (h + margin) + margin, (i % columns) * (w + margin) + margin
        picture[top : top + h, left : left + w] = image.movedim(0, 2)
    return picture.numpy()


def to_pixels(samples: Tensor) -> Tensor:
    """Samples in [-1, 1] as uint8 of the same shape: 0 is -1, 255 is 1; values beyond are clipped.

    Raises:
        FloatingPointError: samples that are not finite, which no pixel shows.
    """
    check_finite(samples)
    return ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def encode_png(picture: np.ndarray) -> bytes:
    """The PNG file of a picture, uint8 [height, width], or [height, width, 3]."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "PNG")
    return stream.getvalue()


def save_png(samples: Tensor, path: str | Path, columns: int | None = None) -> None:
    """Write samples as a PNG: images and videos as a grid, audio [N, C, T] as waveforms.

    Raises:
        ValueError: samples of another shape.
        OSError: the file cannot be written.
    """
    if samples.ndim == 3:
        _save_waveforms(samples, path)
        return
    from PIL import Image

    picture = Image.fromarray(grid(samples, columns))
    with whole_file(path) as file:
        picture.save(file, format="PNG")


def save_animation(samples: Tensor, path: str | Path, columns: int | None = None, seconds: float = 0.12) -> None:
    """Write clips [N, 1 or 3, D, H, W] side by side as one moving picture that repeats: a .gif, or an .apng.

    Args:
        samples: in [-1, 1]; values beyond are clipped.
        path: of the file. A GIF has 256 colours, an animated PNG all.
        columns: clips a row; None makes about a square.
        seconds: that a frame is shown.

    Raises:
        ValueError: samples of another shape, or a file that ends in something else.
        OSError: the file cannot be written.
    """
    from PIL import Image

    formats = {".gif": "GIF", ".apng": "PNG"}
    if Path(path).suffix.lower() not in formats:
        raise ValueError(f"save_animation: {path} must end in {' or '.join(formats)}")
    if samples.ndim != 5:
        raise ValueError(f"save_animation: expected clips [N, 1 or 3, D, H, W], got {list(samples.shape)}")
    frames = [Image.fromarray(grid(frame, columns)) for frame in samples.unbind(2)]
    with whole_file(path) as file:
        frames[0].save(
            file,
            format=formats[Path(path).suffix.lower()],
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 * seconds),
            loop=0,
        )


def save_spectrograms(waveforms: Tensor, path: str | Path, sample_rate: int, columns: int | None = None) -> None:
    """Write a PNG of the spectrograms of sounds [N, 1, L], each below its waveform.

    The spectra are of 16 ms, every 2 ms, from -80 dB to the loudest of all.

    Args:
        waveforms: in [-1, 1].
        path: of the file.
        sample_rate: in Hz.
        columns: sounds a row; None takes 8 at most.

    Raises:
        ValueError: sounds of another shape.
        FloatingPointError: sounds that are not finite.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    if waveforms.ndim != 3 or waveforms.shape[1] != 1 or not len(waveforms):
        raise ValueError(f"save_spectrograms: expected sounds [N, 1, L], got {list(waveforms.shape)}")
    check_finite(waveforms)
    waves, window = waveforms[:, 0].float().cpu(), 2 * round(0.008 * sample_rate)
    spectra = torch.stft(
        waves, window, window // 8, window=torch.hann_window(window), pad_mode="constant", return_complex=True
    )
    decibels = 20.0 * (spectra.abs() / spectra.abs().max().clamp(min=1e-9)).clamp(min=1e-4).log10()
    columns = min(columns or 8, len(waves))
    rows, seconds = -(-len(waves) // columns), waves.shape[1] / sample_rate
    times = np.arange(waves.shape[1]) / sample_rate
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1, 3] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (wave, loudness) in enumerate(zip(waves, decibels, strict=True)):
        above, below = (axes[2 * (i // columns) + part, i % columns] for part in (0, 1))
        above.plot(times, wave.numpy(), linewidth=0.4)
        above.set(xlim=(0, seconds), ylim=(-1.05, 1.05))
        extent = (0, seconds, 0, sample_rate / 2000)
        below.imshow(loudness.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-80, vmax=0)
    for part in range(1, 2 * rows, 2):
        axes[part, 0].set_axis_on()
        axes[part, 0].set_ylabel("kHz", fontsize=7)
        axes[part, 0].tick_params(labelsize=6)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def read_image(path: str | Path, channels: int, size: Sequence[int], *, nearest: bool = False) -> tuple[Tensor, str]:
    """Read a picture of any size and mode as a model takes it.

    It is turned as its EXIF says, laid over white where it is transparent, cut at the middle to the proportions asked
    for, and resized (bicubic, with antialiasing). 16-bit grey keeps its depth.

    Args:
        path: of a file that Pillow reads; of several frames the first is taken.
        channels: 3 for red, green and blue, or 1 for grey.
        size: height and width of the result.
        nearest: take the nearest pixels instead, for masks.

    Returns:
        [channels, height, width] in [-1, 1], and a line that says what was done.

    Raises:
        OSError: there is no such file, or no picture in it.
        ValueError: a picture whose values have no known range, or that is too large for Pillow's limit.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            pixels = _pixels(image, channels)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except SyntaxError as error:  # what Pillow raises of a broken PNG
        raise ValueError(f"{path} is damaged: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: pictures of Pillow's mode {error} have no known range of values") from error
    told = [f"{path}: {image.width} x {image.height} {image.mode}"]
    height, width = size
    scale = min(image.height / height, image.width / width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    if (h, w) != (image.height, image.width):
        top, left = (image.height - h) // 2, (image.width - w) // 2
        pixels = pixels[:, top : top + h, left : left + w]
        told.append(f"cut to {w} x {h}")
    if (h, w) != (height, width):
        how: dict[str, Any] = {"mode": "nearest-exact"} if nearest else {"mode": "bicubic", "antialias": True}
        pixels = F.interpolate(pixels[None], size=(height, width), **how)[0]
        told.append(f"resized to {width} x {height}")
    return 2 * pixels.clamp(0, 1) - 1, ", ".join(told)


def _pixels(image: Any, channels: int) -> Tensor:
    """An image's values in [0, 1], [channels, H, W]."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey
        values = torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535
        if values.min() < 0 or values.max() > 1:
            raise KeyError(image.mode)
        return values.expand(channels, -1, -1)
    if image.mode == "F":
        raise KeyError(image.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels).movedim(2, 0) / 255


def _save_waveforms(samples: Tensor, path: str | Path) -> None:
    from matplotlib.figure import Figure

    check_finite(samples)
    figure = Figure(figsize=(8, 1.2 * len(samples)), layout="tight")
    for axes, sample in zip(figure.subplots(len(samples), squeeze=False)[:, 0], samples.float().cpu(), strict=True):
        axes.plot(sample.T, linewidth=0.6)
        axes.set_ylim(-1.05, 1.05)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
