"""The random numbers of training: functions of the seed and of what they are for, so that nothing has to be stored.

Where an update stands in a run, and where a sample stands in the update's batch, is all that its numbers depend on:
not on how often the run was stopped, on the number of processes, or on how a batch is divided. Philox4x32-10 as in
`cmfast.noise`: the numbers of a method are the noise of a seed whose high word counts the method's calls from 1 (of
sampling with the same seed it is 0), with the update as the draw; other choices have 1 in the counter's last word.
"""

import enum
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.reference.philox import philox4x32
from ..noise import gaussian

#: Seeds are below it: the high word of Philox's seed counts calls.
SEEDS = 1 << 32


class UpdateDraws:
    """The numbers of one update for some samples of its batch; see `cmfast.training.methods.method.Draws`."""

    def __init__(self, seed: int, iteration: int, first_sample: int = 0) -> None:
        """Take the run's seed, 0 ≤ seed < 2³², the update, and where in the update's batch the samples begin."""
        self.seed, self.iteration, self.first_sample, self.calls = seed, iteration, first_sample, 0

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of `like` [N, ...]."""
        return self._normal(like, like.dtype)

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1), as `normal`: the normal distribution function of normal numbers, to about 2⁻²³."""
        numbers = torch.special.ndtr(self._normal(like, torch.float32)).to(like.dtype)
        return numbers.clamp(max=1.0 - torch.finfo(like.dtype).eps / 2)

    def _normal(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        self.calls += 1
        shape = like.shape if like.ndim > 1 else (*like.shape, 1)
        seed = self.calls << 32 | self.seed
        return gaussian(shape, seed, self.iteration, self.first_sample, dtype=dtype, device=like.device).reshape(
            like.shape
        )


class Purpose(enum.IntEnum):
    """What words are drawn for."""

    ORDER = 1
    FLIP = 2
    MODULES = 3


def words(seed: int, purpose: Purpose, number: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Two random 32-bit words for each index, as int64 tensors of the shape of `indices`, on the host.

    Args:
        seed: of the run, 0 ≤ seed < 2³².
        purpose: what they are for.
        number: of the update or the epoch.
        indices: int64, from 0 to 2³² - 1.
    """
    counter = [torch.tensor(value) for value in (0, number, int(purpose), 1)]
    first, second, *_ = philox4x32(counter, (torch.tensor(seed), indices))
    return first, second


def order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation [length] in which an epoch goes through the data."""
    first, second = words(seed, Purpose.ORDER, epoch, torch.arange(length))
    return torch.argsort(first << 31 | second >> 1, stable=True)


def flips(seed: int, iteration: int, first_sample: int, count: int) -> Tensor:
    """Whether each of `count` samples of an update's batch is mirrored [count], with probability one half."""
    indices = torch.arange(first_sample, first_sample + count)
    return (words(seed, Purpose.FLIP, iteration, indices)[0] & 1).bool()


def module_seed(seed: int, iteration: int, part: int) -> int:
    """A seed for torch's generators, from which modules such as dropout draw, for a part of an update's batch."""
    counter: Any = (0, iteration, int(Purpose.MODULES), 1)  # Python's integers are as good, and a hundred times faster
    first, second, *_ = philox4x32(counter, cast(Any, (seed, part)))
    return cast(int, first << 31 | second >> 1)
