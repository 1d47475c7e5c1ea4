import csv
import importlib.util
import resource
import sys
import types

import pytest

from cmfast.training import LoopSettings, train
from cmfast.training.logs import CsvLog, Row, open_logs

from .tiny import Denoising, data, ended, forked

ROWS = [Row(i, 0.1 * i, 1e-3, 2.0, 300.0) for i in (2, 4, 6)]


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_log_goes_on_where_the_training_does(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, 0)
    for row in ROWS:
        log.write(row)
        assert len(read(path)) == row.iteration // 2 + 1  # it can be read at once
    log.close()
    path.write_text(path.read_text() + "8,0.5")  # a row that was cut off
    log = CsvLog(path, 4)
    log.write(Row(5, 0.25, 1e-3, 1.0, 1.0))
    log.close()
    found = read(path)
    assert found[0] == list(Row._fields)
    assert [tuple(map(float, row)) for row in found[1:]] == [*ROWS[:2], (5, 0.25, 1e-3, 1.0, 1.0)]
    CsvLog(path, 0).close()  # a new one
    assert read(path) == [list(Row._fields)]


def test_rows_have_means_rates_and_norms(tmp_path):
    losses = []
    settings = LoopSettings(
        iterations=5, batch_size=4, learning_rate=0.1, schedule="cosine", log_interval=2, gradient_clip=1e-3
    )
    train(Denoising(), data(), settings, out=tmp_path, progress=lambda i, loss: losses.append(loss))
    header, *rows = read(tmp_path / "log.csv")
    assert header == ["iteration", "loss", "learning_rate", "gradient_norm", "samples_per_second"]
    numbers = [list(map(float, row)) for row in rows]
    assert [row[0] for row in numbers] == [2, 4, 5]
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [row[1] for row in numbers] == pytest.approx(means)
    assert numbers[0][2] == pytest.approx(0.1 * 0.904508)  # (1 + cos(π/5)) / 2
    assert all(row[3] > 1e-3 for row in numbers)  # before clipping
    assert all(row[4] > 0 for row in numbers)


def test_a_log_that_cannot_be_written_names_its_file(tmp_path):
    log = CsvLog(tmp_path / "log.csv", 0)

    def training():
        resource.setrlimit(resource.RLIMIT_FSIZE, (90, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        log.write(ROWS[0])
        with pytest.raises(OSError, match=r"File too large: '.*log\.csv'"):
            log.write(ROWS[1])

    assert ended(forked(training)) == 0


def test_tensorboard_is_used_where_it_is_installed(tmp_path, monkeypatch):
    if importlib.util.find_spec("tensorboard") is None:
        assert len(open_logs(tmp_path, 0)) == 1
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *point):
            calls.append(point)

        def close(self):
            calls.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    _, log = open_logs(tmp_path, 3)
    log.write(ROWS[1])
    log.close()
    points = [("loss", 0.4, 4), ("learning_rate", 1e-3, 4), ("gradient_norm", 2.0, 4), ("samples_per_second", 300.0, 4)]
    assert calls == [(tmp_path / "tensorboard", 4), *points, "closed"]
