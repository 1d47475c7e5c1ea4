"""Samples as PNG pictures."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import whole_file

_MIN_CELL = 64  # pixels: smaller images are enlarged by a whole factor


def grid(samples: Tensor, columns: int | None = None, margin: int = 2) -> np.ndarray:
    """Lay samples out as one picture [height, width, 3], uint8.

    Args:
        samples: images [N, C, H, W] or videos [N, C, D, H, W] (a row of frames each), C 1 or 3, in [-1, 1]; values
            beyond are clipped.
        columns: samples a row; None makes about a square (one column for videos).
        margin: pixels between samples.

    Raises:
        ValueError: samples of another shape.
    """
    if samples.ndim not in (4, 5) or samples.shape[1] not in (1, 3) or not len(samples):
        raise ValueError(f"grid: expected samples [N, 1 or 3, H, W] or [N, 1 or 3, D, H, W], got {list(samples.shape)}")
    if samples.ndim == 5:  # frames side by side
        samples, columns = samples.movedim(2, 3).flatten(3), columns or 1
    n, _, h, w = samples.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows, factor = -(-n // columns), max(1, -(-_MIN_CELL // min(h, w)))
    pixels = ((samples.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.expand(n, 3, h, w).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w = h * factor, w * factor
    picture = torch.full((rows * (h + margin) + margin, columns * (w + margin) + margin, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (h + margin) + margin, (i % columns) * (w + margin) + margin
        picture[top : top + h, left : left + w] = image.movedim(0, 2)
    return picture.numpy()


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


def _save_waveforms(samples: Tensor, path: str | Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 * len(samples)), layout="tight")
    for axes, sample in zip(figure.subplots(len(samples), squeeze=False)[:, 0], samples.float().cpu(), strict=True):
        axes.plot(sample.T, linewidth=0.6)
        axes.set_ylim(-1.05, 1.05)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
