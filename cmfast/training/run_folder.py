"""The folder that a training writes: checkpoints, logs, and snapshots of the averages."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import CheckpointError
from ..files import check_writable, held, whole_file
from . import checkpoint
from .distributed import Processes
from .logs import Log, Row, open_logs
from .settings import LoopSettings
from .snapshots import found as found_snapshots
from .snapshots import remove_snapshots, write_snapshot
from .state import State


class RunFolder:
    """Writes `checkpoints/`, `log.csv`, `tensorboard/` and `snapshots/` as the training goes, by its first process."""

    def __init__(
        self,
        folder: Path,
        settings: LoopSettings,
        description: Mapping[str, Any],
        processes: Processes,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.settings, self.description = folder, settings, description
        self.processes, self.say = processes, say
        self._logs: list[Log] = []
        self._lock: int | None = None

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.folder / "checkpoints"

    def begin(self, state: State, resume: bool, config: str | None = None) -> None:
        """Bring the state to where the last checkpoint has it, if the training is to be resumed, and open the logs.

        What `config` has is written to `config.yaml`.

        Raises:
            OSError: the folder cannot be written to, or another process is training in it.
            FileExistsError: it has checkpoints, and the training is not to be resumed; or the results of a training
                whose checkpoints are gone.
            ValueError: it is to be resumed with other settings or other data; the message says what differs.
            CheckpointError: the checkpoint is damaged.
        """
        if self.processes.rank == 0:
            check_writable(self.folder / "log.csv")
            self._lock = held(self.folder)
            checkpoint.remove_leftovers(self.checkpoints)
            for path in (*self.folder.glob(".log-*.csv"), *self.folder.glob(".config-*.yaml")):
                path.unlink()
        self.processes.wait()
        if not resume:
            check_new(self.folder)
        paths = checkpoint.found(self.checkpoints)
        if not paths:
            self._check_unfinished()
        if paths:
            self._load(state, paths)
        elif resume:
            self.say(f"{self.folder} has no checkpoint yet: the training begins")
        # All have read the checkpoint then, which may be removed later.
        if not self.processes.agree(state.loss_sum.new_tensor(float(state.iteration))):
            raise ValueError(
                f"{self.folder}: this process is after {state.iteration} updates, others are not: all must see one "
                "folder"
            )
        if self.processes.rank == 0:
            checkpoint.remove_old(self.checkpoints, self.settings.keep_checkpoints)
            remove_snapshots(self.folder / "snapshots", state.iteration)
            if config is not None:
                with whole_file(self.folder / "config.yaml") as file:
                    file.write_text(config, encoding="utf-8")
            self._logs = open_logs(self.folder, state.iteration)

    def _check_unfinished(self) -> None:
        """Raise FileExistsError where there is more than a training leaves that ended before its first checkpoint."""
        first = min(self.settings.checkpoint_interval, self.settings.iterations)
        left = [str(i) for i in found_snapshots(self.folder / "snapshots") if i > first]
        if left or (self.folder / "model").exists():
            what = f"snapshots after {left[-1]} updates" if left else "the model"
            raise FileExistsError(
                f"{self.folder} has {what} of a training whose checkpoints are gone: it cannot be resumed, and a new "
                "one would take its place; name another folder"
            )

    def _load(self, state: State, paths: Mapping[int, Path]) -> None:
        path = paths[max(paths)]
        try:
            tensors, content = checkpoint.read(path)
        except CheckpointError as error:
            before = f"; remove that folder to go on after {sorted(paths)[-2]} updates" if len(paths) > 1 else ""
            raise CheckpointError(f"{error}{before}") from error
        try:
            before, numbers, versions = content["settings"], content["state"], content["versions"]
        except KeyError as error:
            raise CheckpointError(f"{path / checkpoint.DESCRIPTION} is not a training's: {error} is missing") from error
        if different := checkpoint.differences(before, self.description):
            raise ValueError(f"{path} is of another training and cannot be resumed with this: {'; '.join(different)}")
        if different := checkpoint.differences(versions, checkpoint.versions()):
            self.say(f"bits may differ from those of an undisturbed training: {'; '.join(different)}")
        try:
            state.load(tensors, numbers)
        except (LookupError, RuntimeError, StopIteration) as error:
            raise CheckpointError(f"{path} does not fit this training: {str(error).splitlines()[0]}") from error
        self.say(f"resumed after {state.iteration} updates")

    def log(self, row: Row) -> None:
        """Add a row to the logs."""
        for log in self._logs:
            log.write(row)

    def due(self, iteration: int) -> bool:
        """Whether something of the weights is written after so many updates."""
        s = self.settings
        snapshot = bool(s.power_ema) and iteration % s.snapshot_interval == 0
        return snapshot or iteration % s.checkpoint_interval == 0 or iteration == s.iterations

    def write(self, state: State) -> None:
        """Write the snapshot and the checkpoint that are due. The snapshot first: a checkpoint has all before it."""
        if self.processes.rank != 0:
            return
        s, last = self.settings, state.iteration == self.settings.iterations
        if s.power_ema and (last or state.iteration % s.snapshot_interval == 0):
            write_snapshot(self.folder / "snapshots", state.averages, state.iteration)
        if last or state.iteration % s.checkpoint_interval == 0:
            content = {
                "format": "cmfast training",
                "settings": self.description,
                "state": state.numbers(),
                "versions": checkpoint.versions(),
            }
            checkpoint.write(self.checkpoints, state.iteration, state.tensors(), content, s.keep_checkpoints)

    def close(self) -> None:
        """Close the logs."""
        for log in self._logs:
            log.close()
        if self._lock is not None:
            os.close(self._lock)


def check_new(folder: Path) -> None:
    """Raise FileExistsError where a training's folder has checkpoints."""
    if paths := checkpoint.found(folder / "checkpoints"):
        raise FileExistsError(
            f"{folder} has a training after {max(paths)} updates: resume it (--resume), or name another folder"
        )
