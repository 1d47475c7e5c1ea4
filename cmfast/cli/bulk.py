"""`cmfast sample` with a folder as --out: this process's share of a run."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..bulk import Process, Run
from .options import kernels_of, load_model

_SECONDS = 0.2  # between two looks into the folder


def sample_in_bulk(
    model: tuple[str, str | None, str, bool, str],
    out: Path,
    count: int,
    process: Process,
    threads: int | None,
    progress: bool,
    settings: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> None:
    """Make the shards of a process's share that are not in the folder yet, and say what is there then.

    Args:
        model: the options that load it, as `load_model` takes them.
        out: the folder.
        count: of samples of all processes.
        process: which one this is. It has a GPU of its own, or its share of the processor's cores.
        threads: instead of that share, and of those that leave no trace in the samples.
        progress: show a progress bar of all processes, in the first one.
        settings: of `bulk.Run`; None for its defaults.
        plan: arguments of `ConsistencyModel.sample` that all processes have in common.
    """
    source, device, dtype, accelerated, backend = model
    if share := threads or process.threads:
        torch.set_num_threads(share)
    if device in (None, "cuda") and torch.cuda.is_available():
        device = process.gpu(torch.cuda.device_count())
        torch.cuda.set_device(device)
    given = {name: value for name, value in {**settings, "threads": threads}.items() if value is not None}
    with kernels_of(backend):
        run = Run(load_model(source, device, dtype, accelerated, backend), out, count, **given, **plan)
        if run.differences:
            differences = "; ".join(run.differences)
            print(f"cmfast: {out} was begun elsewhere, last bits may differ: {differences}", file=sys.stderr)
        with _progress(run, progress and process.index == 0) as show:
            made = run.work(process.index, process.count, show)
    there = run.there()
    who = "" if process.count == 1 else f"process {process.index} of {process.count}: "
    print(f"{who}{made} shards made; {out} has {len(there)} of {len(run.shards)}, {sum(there)} of {count} samples")


@contextmanager
def _progress(run: Run, wanted: bool) -> Iterator[Callable[[int], None] | None]:
    """What shows the samples that are in the folder, whoever made them, and those that this process has at hand."""
    if not wanted:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=run.shards.samples, initial=sum(run.there()), desc="sampling", unit="sample") as bar:
        shown = 0.0

        def show(at_hand: int) -> None:
            nonlocal shown
            if at_hand and time.monotonic() - shown < _SECONDS:
                return
            bar.update(min(sum(run.there()) + at_hand, bar.total) - bar.n)
            shown = time.monotonic()

        yield show
