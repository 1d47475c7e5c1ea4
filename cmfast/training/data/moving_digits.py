"""Clips of scikit-learn's digits that move and bounce, after Moving MNIST.

Srivastava et al. 2015, "Unsupervised Learning of Video Representations using LSTMs", section 4, with one digit a clip.
"""

import torch
from torch import Tensor

from .dataset import Dataset, scaled
from .digits import load_digits

#: Pixels of a frame's side, frames of a clip, and pixels that a digit moves from one to the next.
SIZE, FRAMES, STEP = 16, 8, 2


def load_moving_digits(clips: int = 8, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Clips of `FRAMES` frames of `SIZE` × `SIZE` pixels, as (training, test) sets of [M, 1, 8, 16, 16].

    Each is of one of the digits of `load_digits`, 8×8 pixels, of the same of its sets: it begins at any even row and
    column, moves by `STEP` pixels a frame in one of eight directions, and is reflected where it meets an edge. Its
    class is the digit.

    Args:
        clips: of each digit, which differ in place and direction.
        seed: of the places and directions.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = (_moving(part, clips, generator) for part in load_digits())
    return train, test


def _moving(digits: Dataset, clips: int, generator: torch.Generator) -> Dataset:
    """`clips` clips of each of the digits."""
    pixels = ((digits.images[:, 0] + 1.0) * 127.5).round().to(torch.uint8).repeat(clips, 1, 1)
    count, side = len(pixels), pixels.shape[-1]
    directions = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])
    places = (SIZE - side) // STEP  # of a digit's corner, from 0, in steps
    start = torch.randint(places + 1, (count, 1, 2), generator=generator)
    step = directions[torch.randint(len(directions), (count, 1), generator=generator)]
    corners = STEP * reflected(start + step * torch.arange(FRAMES)[:, None], places)  # [count, FRAMES, 2]
    video = torch.zeros((count, FRAMES, SIZE, SIZE), dtype=torch.uint8)
    rows, columns = (corners[..., i, None] + torch.arange(side) for i in (0, 1))  # [count, FRAMES, side]
    clip, frame = torch.arange(count)[:, None, None, None], torch.arange(FRAMES)[:, None, None]
    video[clip, frame, rows[..., :, None], columns[..., None, :]] = pixels[:, None].expand(-1, FRAMES, -1, -1)
    return Dataset(scaled(video[:, None]), digits.labels.repeat(clips))


def reflected(positions: Tensor, last: int) -> Tensor:
    """Whole numbers as positions from 0 to `last` of what is reflected at both: last + 1 is last - 1, -1 is 1."""
    return last - (positions.remainder(2 * last) - last).abs()
