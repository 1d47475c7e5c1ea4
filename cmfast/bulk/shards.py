"""How the samples of a run are divided: into shards of adjacent samples, and the shards among processes."""

import dataclasses
from collections.abc import Iterator

#: Counter-based noise numbers samples by 32 bits.
MOST_SAMPLES = 1 << 32


@dataclasses.dataclass(frozen=True)
class Shard:
    """Adjacent samples that are written together.

    Attributes:
        index: of the shard in its run.
        first_sample: index of the first sample.
        count: of samples.
    """

    index: int
    first_sample: int
    count: int

    @property
    def last_sample(self) -> int:
        """Index of the last sample."""
        return self.first_sample + self.count - 1


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of a run: `shards[k]` has the samples from first_sample + k · size on.

    Attributes:
        first_sample: index of the run's first sample.
        samples: of the run.
        size: samples of a shard; the last one may have fewer.

    Raises:
        ValueError: a number is out of range.
    """

    first_sample: int
    samples: int
    size: int

    def __post_init__(self) -> None:
        if self.samples < 1 or self.size < 1:
            raise ValueError(f"samples and samples of a shard must be at least 1, got {self.samples} and {self.size}")
        if self.first_sample < 0 or self.first_sample + self.samples > MOST_SAMPLES:
            raise ValueError(
                f"samples must have indices in 0 … {MOST_SAMPLES - 1}, "
                f"got {self.first_sample} … {self.first_sample + self.samples - 1}"
            )

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def __getitem__(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(f"shards are numbered 0 … {len(self) - 1}, got {index}")
        done = index * self.size
        return Shard(index, self.first_sample + done, min(self.size, self.samples - done))

    def __iter__(self) -> Iterator[Shard]:
        return map(self.__getitem__, range(len(self)))

    def share(self, process: int, processes: int) -> Iterator[Shard]:
        """Those of one of so many processes: every `processes`-th shard, from the process's own number on."""
        return map(self.__getitem__, range(process, len(self), processes))
