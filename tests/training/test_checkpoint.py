import json
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from cmfast.checkpoints import CheckpointError
from cmfast.evaluation.classifier import Classifier, save_classifier
from cmfast.training import LoopSettings, checkpoint, train
from cmfast.training.methods.losses import DistanceSettings

from .tiny import Denoising, data, ended, forked, same, weights

SETTINGS = LoopSettings(
    iterations=9,
    batch_size=4,
    learning_rate=0.01,
    schedule="cosine",
    ema_decays=(0.5,),
    power_ema=(0.05, 0.1),
    horizontal_flip=True,
    log_interval=2,
    checkpoint_interval=3,
    snapshot_interval=3,
)


def changed(**fields):
    return LoopSettings(**{**SETTINGS.__dict__, **fields})


def run(out, settings=SETTINGS, resume=False, **options):
    return train(Denoising(dropout=0.2), data(), settings, out=out, resume=resume, config="a: 1\n", **options)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def rows(folder):
    """The log without the speed."""
    return [line.split(",")[:4] for line in (folder / "log.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return weights(run(folder)), folder


def test_what_is_written(undisturbed):
    _, folder = undisturbed
    both = ("training.json", "training.safetensors")
    kept = [f"checkpoints/{i:09d}/{name}" for i in (6, 9) for name in both]
    snapshots = [f"snapshots/{i:09d}.safetensors" for i in (3, 6, 9)]
    assert files(folder) == sorted(["config.yaml", "log.csv", *kept, *snapshots])
    assert [row[0] for row in rows(folder)] == ["iteration", "2", "4", "6", "8", "9"]


#: For many runs: two checkpoints, of which one is kept.
BRIEF = changed(iterations=4, checkpoint_interval=2, keep_checkpoints=1, snapshot_interval=2)


def killed_at(call, folder):
    """Run BRIEF in a fork that SIGKILL ends at a call into the file system, from 0; False where there are fewer."""
    count = 0

    def audit(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"):
            if str(folder) not in str(arguments[0]):
                return
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def training():
        sys.addaudithook(audit)  # for the rest of the process: of the fork alone
        run(folder, BRIEF, resume=True)

    status = ended(forked(training))
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_killed_anywhere_and_resumed_it_is_the_same(tmp_path):
    """At each of its calls into the file system, and some twice in a row: the same bits, log and files."""
    folder = tmp_path / "undisturbed"
    expected = weights(run(folder, BRIEF))
    call = 0
    while killed_at(call, tmp_path / str(call)):
        again = tmp_path / str(call)
        if call % 5 == 0:  # what a killed one left is taken up by one that is killed too
            killed_at(call // 2, again)
        assert same(weights(run(again, BRIEF, resume=True)), expected)
        assert rows(again) == rows(folder)
        assert files(again) == files(folder)
        for name in files(folder):
            if name.endswith(".safetensors"):
                assert (again / name).read_bytes() == (folder / name).read_bytes(), name
        call += 1
    assert call > 40


def test_stopped_between_updates_it_goes_on(undisturbed, tmp_path):
    expected, folder = undisturbed

    def stop(i, loss):
        if i == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop)
    seen, said = [], []
    found = run(tmp_path, resume=True, progress=lambda i, loss: seen.append(i), say=said.append)
    assert seen == [6, 7, 8]
    assert said == ["resumed after 6 updates"]
    assert same(weights(found), expected)
    assert rows(tmp_path) == rows(folder)
    found = run(tmp_path, resume=True, progress=lambda i, loss: seen.append(i))  # nothing is left
    assert seen == [6, 7, 8]
    assert same(weights(found), expected)


def test_another_training_is_not_resumed(undisturbed, tmp_path):
    _, folder = undisturbed
    before = files(folder)
    with pytest.raises(FileExistsError, match="has a training after 9 updates: resume it"):
        run(folder)
    with pytest.raises(
        ValueError, match=r"cannot be resumed .* loop.learning_rate is 0\.02, was 0\.01; loop.seed is 1"
    ):
        run(folder, changed(learning_rate=0.02, seed=1), resume=True)
    other = data()._replace(images=data().images + 0.001)
    with pytest.raises(ValueError, match=r"data\.fingerprint is"):
        train(Denoising(dropout=0.2), other, SETTINGS, out=folder, resume=True)
    with pytest.raises(ValueError, match="teacher is 2, was not there"):
        run(folder, resume=True, description={"teacher": 2})
    assert files(folder) == before
    run(folder, changed(log_interval=5, checkpoint_interval=1, keep_checkpoints=7), resume=True)  # of no effect
    said = []
    run(tmp_path / "new", changed(iterations=1), resume=True, say=said.append)
    assert said == [f"{tmp_path / 'new'} has no checkpoint yet: the training begins"]


def test_a_folder_has_one_training_at_a_time(undisturbed, tmp_path):
    """Another one is refused while it runs, resumed or new, and then it may go on."""
    expected, _ = undisturbed
    tried = []

    def another(iteration, loss):
        if iteration in (1, 5):  # before the first checkpoint, and after it
            for resume in (False, True):
                with pytest.raises(BlockingIOError, match=f"{tmp_path}: another process is writing there"):
                    run(tmp_path, changed(seed=1), resume=resume)
                tried.append(iteration)
        if iteration == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=another)
    assert tried == [1, 1, 5, 5]
    assert same(weights(run(tmp_path, resume=True)), expected)


def test_the_classifier_of_a_loss_is_told_by_its_weights(tmp_path, monkeypatch):
    """Not by its path: the folder may be another one, and the file must be the same."""
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        torch.manual_seed(seed)
        save_classifier(Classifier(size=4, num_classes=2), tmp_path / name)

    def train_by(name, **options):
        method = Denoising()
        method.settings = DistanceSettings(features=str(name))
        return train(method, data(), changed(iterations=2), out=tmp_path / "out", **options)

    train_by(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    train_by("a", resume=True)
    train_by("b", resume=True)
    with pytest.raises(ValueError, match=r"cannot be resumed with this: method\.features is \w{32}, was \w{32}$"):
        train_by("c", resume=True)


def test_damaged_checkpoints_are_refused(tmp_path):
    run(tmp_path, changed(iterations=3))
    path = tmp_path / "checkpoints" / "000000003"
    whole, description = (path / "training.safetensors").read_bytes(), (path / "training.json").read_text()
    (path / "training.safetensors").write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        run(tmp_path, changed(iterations=3), resume=True)
    (path / "training.safetensors").write_bytes(whole)
    (path / "training.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is missing"):
        run(tmp_path, changed(iterations=3), resume=True)
    content = json.loads(description)
    content["versions"]["torch"] = "1.0"
    (path / "training.json").write_text(json.dumps(content))
    said = []
    run(tmp_path, changed(iterations=3), resume=True, say=said.append)
    assert said[0] == f"bits may differ from those of an undisturbed training: torch is {torch.__version__}, was 1.0"
    (path / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.json is missing$"):
        run(tmp_path, changed(iterations=3), resume=True)


def test_of_a_damaged_checkpoint_the_one_before_it_is_named(undisturbed, tmp_path):
    expected, folder = undisturbed
    shutil.copytree(folder, tmp_path / "copy")
    damaged = tmp_path / "copy" / "checkpoints" / "000000009"
    (damaged / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"is missing; remove that folder to go on after 6 updates$"):
        run(tmp_path / "copy", resume=True)
    shutil.rmtree(damaged)
    assert same(weights(run(tmp_path / "copy", resume=True)), expected)


@pytest.mark.parametrize("size", [500, 3000], ids=["snapshot", "checkpoint"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, undisturbed, size):
    """A limit of a file's size stands for the disk: one line, nothing half written, and it can be resumed."""

    def stop(i, loss):
        if i == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def training():
        try:
            run(tmp_path, progress=stop)
        except OSError as error:
            Path(tmp_path / "error").write_text(f"{error.filename}: {error.strerror}")

    assert ended(forked(training)) == 0
    assert re.fullmatch(rf"{tmp_path}/.*0009.*: File too large", (tmp_path / "error").read_text())
    (tmp_path / "error").unlink()
    expected, folder = undisturbed
    assert not [name for name in files(tmp_path) if "/." in name]
    assert ("snapshots/000000009.safetensors" in files(tmp_path)) == (size == 3000)
    assert sorted(checkpoint.found(tmp_path / "checkpoints")) == [3, 6]
    assert same(weights(run(tmp_path, resume=True)), expected)
    assert files(tmp_path) == files(folder)


def test_places_that_cannot_be_written_are_found_out_first(tmp_path):
    (tmp_path / "file").write_text("x")
    seen = []
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file", progress=lambda i, loss: seen.append(i))
    assert not seen


def test_results_whose_checkpoints_are_gone_stay(undisturbed, tmp_path):
    _, folder = undisturbed
    shutil.copytree(folder, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    before = files(tmp_path / "a")
    (tmp_path / "b" / "model").mkdir(parents=True)
    for name, what in (("a", "snapshots after 9 updates"), ("b", "the model")):
        for resume in (False, True):
            with pytest.raises(FileExistsError, match=f"has {what} of a training whose checkpoints are gone"):
                run(tmp_path / name, changed(seed=1), resume=resume)
    assert files(tmp_path / "a") == before


def test_other_threads_may_give_other_bits_and_that_is_said(undisturbed, tmp_path):
    _, folder = undisturbed
    shutil.copytree(folder, tmp_path / "a")
    before, said = torch.get_num_threads(), []
    try:
        torch.set_num_threads(before + 1)
        run(tmp_path / "a", resume=True, say=said.append)
    finally:
        torch.set_num_threads(before)
    text = f"bits may differ from those of an undisturbed training: threads is {before + 1}, was {before}"
    assert said == [text, "resumed after 9 updates"]


def test_a_compiler_that_is_none_is_found_out_before_anything_is_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"compile: expected a backend of torch.compile \(.*inductor.*, got 'inducter'"
    ):
        run(tmp_path / "a", changed(compile="inducter"))
    assert not (tmp_path / "a").exists()
