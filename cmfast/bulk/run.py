"""A run: samples of a model, written to a folder shard by shard."""

import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.accelerator import accelerator_of
from ..finite import check_finite
from ..kernels.backends import chosen
from ..model import ConsistencyModel
from ..pictures import to_pixels
from . import manifest
from .formats import FORMATS, Block, Map, digits_of, dtype_of
from .processes import Process
from .shards import MOST_SAMPLES, Shard, Shards
from .threads import most_threads, threads_of_torch
from .unfinished import clear, workplace

#: Images of fewer values are compressed sooner than another thread is woken.
_SMALL = 1 << 12


class Run:
    """Samples first_sample … first_sample + count - 1 of a model, in a folder.

    What is in the folder is a function of the weights and the settings alone: any number of processes may make the
    shards, in any order, be killed at any moment and be started again. A shard is there when its file is: a file gets
    its name when it is whole. A shard is always evaluated in the same batches, so that it is the same to the byte.

    Attributes:
        folder: where they are written.
        shards: how they are divided.
        differences: in what this machine or these versions differ from those that began the run, a line each; with
            others, samples may differ in their last bits.
    """

    def __init__(
        self,
        model: ConsistencyModel,
        folder: str | Path,
        count: int,
        *,
        format: str = "npz",
        dtype_out: str | None = None,
        shard_size: int = 1024,
        batch_size: int = 64,
        class_labels: int | Sequence[int] | Tensor | None = None,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | None = None,
        seed: int = 0,
        first_sample: int = 0,
        threads: int | None = None,
    ) -> None:
        """Begin a run, or continue the one that is in the folder.

        Args:
            model: accelerated or not, on any device.
            folder: a new or empty one, or one of a run of the same settings.
            count: of samples.
            format: a name of `FORMATS`.
            dtype_out: what samples are kept as, "uint8" (0 for -1, 255 for 1) or "float32"; None means uint8 for images
                and videos of 1 or 3 channels, and float32 for others.
            shard_size: samples of a shard. A process has a shard's samples in memory, and loses them when it is killed.
            batch_size: samples that are evaluated at once. Batches begin with a shard, and what the last one has more
                than the shard is thrown away: best is a size that divides shard_size.
            class_labels: as for `ConsistencyModel.sample`.
            steps: as for `ConsistencyModel.sample`.
            timesteps: as for `ConsistencyModel.sample`.
            sigmas: as for `ConsistencyModel.sample`.
            sampler: as for `ConsistencyModel.sample`.
            seed: of the noise.
            first_sample: index of the first sample.
            threads: of the processor that evaluate a batch; None means torch's number of an accelerated UNet, whose
                samples do not depend on it, and else 1. More are one of the run's settings then.

        Raises:
            ValueError: an argument is out of range, the format cannot hold such samples, or the folder has samples of
                other settings; the message says which.
            TypeError: a number of samples or threads, or the seed, that is not whole.
            FileExistsError: the folder has other files.
            OSError: the folder cannot be made or written to.
        """
        self.model = model
        self.folder = Path(folder)
        numbers = (count, shard_size, batch_size, seed, first_sample)
        count, shard_size, batch_size, seed, first_sample = map(operator.index, numbers)  # JSON has no others
        self.shards = Shards(first_sample, count, shard_size)
        if batch_size < 1:
            raise ValueError(f"a batch must have at least 1 sample, got {batch_size}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in 0 … 2⁶⁴ - 1, got {seed}")
        self._dtype_out = dtype_of(format, model.sample_shape, dtype_out)
        self._format = FORMATS[format]
        self._batch_size, self._seed = min(batch_size, shard_size, count), seed
        self._class_labels: int | list[int] | None = None
        if class_labels is not None:
            given = torch.as_tensor(class_labels)
            model._labels(given, count if given.ndim else 1, first_sample)  # or an error, before anything is written
            self._class_labels = given.tolist()
        self._plan: dict[str, Any] = {"steps": steps, "timesteps": timesteps, "sigmas": sigmas, "sampler": sampler}
        self._most_threads = most_threads(model)
        torchs = torch.get_num_threads()
        self._threads = operator.index(threads or 0) or min(torchs, self._most_threads or torchs)
        self._samples_by_name = {self._format.name(shard, self.shards): shard.count for shard in self.shards}
        self.differences = manifest.begin(self.folder, self._settings(format), manifest.made_by(model.device))
        clear(self.folder)
        with workplace(self.folder):  # or an error, before long work
            pass

    def work(self, process: int = 0, processes: int = 1, progress: Callable[[int], None] | None = None) -> int:
        """Make those shards of a process's share that are not there.

        Args:
            process: its number.
            processes: how many there are.
            progress: called with the number of samples that this process has evaluated and not yet written.

        Returns:
            How many shards were made.

        Raises:
            ValueError: no process has such a number.
            OSError: a shard cannot be written; nothing is left of it.
        """
        Process(process, processes)
        made = 0
        pending: Future[None] | None = None

        def advance(samples: int) -> None:
            if progress is not None:
                progress(samples if pending is None or pending.done() else samples + self.shards.size)

        with ThreadPoolExecutor(1, "writer") as writer, _compressors() as compressors, threads_of_torch(self._threads):
            for shard in self.shards.share(process, processes):
                if self.is_there(shard):
                    continue
                block = self._evaluate(shard, advance)
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._write, block, compressors)
                made += 1
            if pending is not None:
                pending.result()
                advance(0)
        return made

    def make(self, index: int) -> Path:
        """Make one shard, unless it is there; returns its path.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        shard = self.shards[index]
        if not self.is_there(shard):
            with _compressors() as compressors, threads_of_torch(self._threads):
                self._write(self._evaluate(shard), compressors)
        return self.path(shard)

    def path(self, shard: Shard) -> Path:
        """The file or folder of a shard."""
        return self.folder / self._format.name(shard, self.shards)

    def is_there(self, shard: Shard) -> bool:
        """Whether a shard was made."""
        return self.path(shard).exists()

    def there(self) -> list[int]:
        """How many samples each shard has that was made, by any process."""
        return [self._samples_by_name[name] for name in os.listdir(self.folder) if name in self._samples_by_name]

    def _evaluate(self, shard: Shard, advance: Callable[[int], None] | None = None) -> Block:
        """In batches of one size, so that one program serves all: what the last has beyond the shard is left out."""
        shape, dtype = (shard.count, *self.model.sample_shape), getattr(torch, self._dtype_out)
        samples = torch.empty(shape, dtype=dtype, device=self.model.device)
        labels = self._labels_of(shard)
        for start in range(0, shard.count, self._batch_size):
            first = shard.first_sample + start
            size, kept = min(self._batch_size, MOST_SAMPLES - first), min(self._batch_size, shard.count - start)
            batch = self.model.sample(
                size,
                class_labels=None if labels is None else _filled(labels[start : start + kept], size),
                seed=self._seed,
                first_sample=first,
                **self._plan,
            )
            check_finite(batch[:kept])
            samples[start : start + kept] = to_pixels(batch[:kept]) if dtype == torch.uint8 else batch[:kept]
            if advance is not None:
                advance(start + kept)
        return Block(shard, samples.cpu().numpy(), labels, self._seed, digits_of(self.shards))

    def _labels_of(self, shard: Shard) -> list[int] | None:
        given = self._class_labels
        if given is not None and not isinstance(given, int):
            begin = shard.first_sample - self.shards.first_sample
            given = given[begin : begin + shard.count]
        labels = self.model._labels(given, shard.count, shard.first_sample)
        return None if labels is None else labels.tolist()

    def _write(self, block: Block, compressors: ThreadPoolExecutor) -> None:
        path = self.path(block.shard)
        mapped: Map = compressors.map if block.samples[0].size >= _SMALL else map
        try:
            with workplace(self.folder) as unfinished:
                self._format.write(path, block, unfinished, mapped)
        except OSError as error:
            if not path.exists():  # nor has another process made it meanwhile
                raise OSError(error.errno, error.strerror or str(error), str(path)) from error

    def _settings(self, format: str) -> dict[str, Any]:
        """What the files are a function of."""
        model, accelerator = self.model, accelerator_of(self.model.unet)
        function, levels = model._plan(grid_steps=None, **self._plan)
        return {
            "weights": manifest.weights_checksum(model.unet),
            "preconditioning": repr(model.preconditioning),
            "sample_shape": list(model.sample_shape),
            "sampler": function.__name__.removeprefix("sample_"),
            "levels": levels,
            "class_labels": self._class_labels if self._class_labels is not None else "in turn",
            "seed": self._seed,
            "first_sample": self.shards.first_sample,
            "count": self.shards.samples,
            "shard_size": self.shards.size,
            "batch_size": self._batch_size,
            "format": format,
            "dtype_out": self._dtype_out,
            "device": model.device.type,
            "threads": _named(self._threads, self._most_threads),
            "accelerated": accelerator is not None,
            "dtype": str(model.dtype if accelerator is None else accelerator.products).removeprefix("torch."),
            "backend": (accelerator.backend if accelerator is not None else None) or chosen(),
        }


def _filled(labels: list[int], size: int) -> list[int]:
    """So many labels, the last one again and again."""
    return labels + labels[-1:] * (size - len(labels))


def _named(threads: int, most: int | None) -> str | int:
    """The number of threads as one of the settings, where it leaves a trace."""
    return "any" if most is None else threads


def _compressors() -> ThreadPoolExecutor:
    """Threads that compress images, with as many of the processor's as torch has."""
    return ThreadPoolExecutor(torch.get_num_threads(), "compressor")
