"""Rows of a training's progress: a CSV file, and TensorBoard where it is installed."""

import contextlib
import csv
from pathlib import Path
from typing import NamedTuple, Protocol

from ..files import named, whole_file


class Row(NamedTuple):
    """What is logged now and then.

    Attributes:
        iteration: updates made.
        loss: mean over the updates since the last row.
        learning_rate: of the last update.
        gradient_norm: of the last update, before clipping.
        samples_per_second: since the last row.
    """

    iteration: int
    loss: float
    learning_rate: float
    gradient_norm: float
    samples_per_second: float


class Log(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Add a row."""

    def close(self) -> None:
        """No more rows come."""


class CsvLog:
    """A CSV file with a line for each row."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Begin a file or, where there is one, go on with it after so many updates: later rows are taken out of it."""
        kept = []
        if path.exists() and iteration:
            with path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if len(row) == len(Row._fields) and row[0].isdecimal()]
        with whole_file(path) as whole, whole.open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *(row for row in kept if int(row[0]) <= iteration)])
        self._path = path
        self._file = path.open("a", newline="", buffering=1)
        self._writer = csv.writer(self._file)

    def write(self, row: Row) -> None:
        """Add a line."""
        try:
            self._writer.writerow(row)
        except OSError as error:
            raise named(error, self._path) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """Event files of TensorBoard, a scalar for each column."""

    def __init__(self, folder: Path, iteration: int) -> None:
        """Go on after so many updates: TensorBoard does not show what was logged later.

        Raises:
            ImportError: tensorboard is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, row: Row) -> None:
        """Add a point to each scalar."""
        for name, value in zip(row._fields[1:], row[1:], strict=True):
            self._writer.add_scalar(name, value, row.iteration)

    def close(self) -> None:
        """Write what is left, and close the files."""
        self._writer.close()


def open_logs(folder: Path, iteration: int) -> list[Log]:
    """The logs of a training's folder, after so many updates: log.csv, and tensorboard/ where it is installed."""
    logs: list[Log] = [CsvLog(folder / "log.csv", iteration)]
    with contextlib.suppress(ImportError):
        logs.append(TensorBoardLog(folder / "tensorboard", iteration))
    return logs
