import os
import shutil
import socket

import pytest
import torch

from cmfast.training import LoopSettings, train
from cmfast.training.distributed import Processes, process_group

from .tiny import Denoising, data, ended, forked, weights

SETTINGS = LoopSettings(iterations=4, batch_size=8, learning_rate=0.01, ema_decays=(0.5,), log_interval=2)


def process_group_of(rank, count, port):
    """What torchrun makes one of several processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return process_group(torch.device("cpu"))


def work(rank, count, port, folder, settings, resume):
    """Leaves the weights of one process of several, and the losses that it was told, in a file."""
    losses = []
    with process_group_of(rank, count, port) as device:
        assert device == torch.device("cpu")
        assert Processes.current() == Processes(rank, count)
        told = {"progress": lambda i, loss: losses.append(loss)}
        trained = train(Denoising(), data(), settings, out=folder / "out", resume=resume, **told)
    torch.save((weights(trained), losses), folder / f"{rank}.pt")


def together(count, function):
    """Call `function(rank, port)` in forks; gives their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [forked(lambda rank=rank: function(rank, port)) for rank in range(count)]
    return [ended(process) for process in started]


def launch(folder, settings, count, resume=False):
    """Train in forks; gives what each one leaves."""
    assert together(count, lambda rank, port: work(rank, count, port, folder, settings, resume)) == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one_with_the_whole_batch(tmp_path, accumulation):
    losses = []
    settings = LoopSettings(**{**SETTINGS.__dict__, "accumulation": accumulation})
    expected = weights(train(Denoising(), data(), SETTINGS, progress=lambda i, loss: losses.append(loss)))
    (first, told), (second, silent) = launch(tmp_path, settings, 2)
    start = Denoising().model.state_dict()
    assert max((expected[f"model.{k}"] - v).abs().max() for k, v in start.items() if "seen" not in k) > 0.01
    for name, value in expected.items():
        if "seen" not in name:
            assert torch.equal(first[name], second[name])
            assert (first[name] - value).abs().max() < 1e-5, name
    assert told == pytest.approx(losses, rel=1e-5)
    assert silent == []
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 3


def test_two_processes_are_resumed(tmp_path):
    """By two: the same bits; the checkpoint is that of any number."""
    settings = LoopSettings(**{**SETTINGS.__dict__, "iterations": 4, "checkpoint_interval": 2})
    (expected, _), _ = launch(tmp_path, settings, 2)
    last = tmp_path / "out" / "checkpoints" / "000000004"
    last.rename(tmp_path / "last")
    (found, told), _ = launch(tmp_path, settings, 2, resume=True)
    assert len(told) == 2
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_processes_that_see_other_checkpoints_say_so(tmp_path):
    """Each of them, also the one whose checkpoint is the mean of the others'."""
    settings = LoopSettings(**{**SETTINGS.__dict__, "batch_size": 9, "checkpoint_interval": 1, "keep_checkpoints": 4})
    for rank in range(3):
        train(Denoising(), data(), settings, out=tmp_path / str(rank))
        for iteration in range(rank + 2, 5):
            shutil.rmtree(tmp_path / str(rank) / "checkpoints" / f"{iteration:09}")

    def join(rank, port):
        with process_group_of(rank, 3, port):
            message = f"is after {rank + 1} updates, others are not: all must see one folder"
            with pytest.raises(ValueError, match=message):
                train(Denoising(), data(), settings, out=tmp_path / str(rank), resume=True)

    assert together(3, join) == [0] * 3


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert Processes.current() == Processes(0, 1)
