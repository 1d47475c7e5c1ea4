import errno
import os
import resource
import stat
import threading

import pytest
import torch

from cmfast import ConsistencyModel
from cmfast.checkpoints import formats
from cmfast.cli import sample
from cmfast.engine.cpu import cache
from cmfast.evaluation.classifier import Classifier, save_classifier
from cmfast.files import check_writable, held, whole_file, whole_folder

from .fixture_files import tiny_unet


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as file:
        file.write_text("content")
        assert not path.exists()
        assert file.suffix == ".txt"
    assert path.read_text() == "content"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o444 == 0o444


def write_and_fail(path):
    with whole_file(path) as file:
        file.write_text("new")
        raise RuntimeError("stop")


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_error_of_writing_names_the_file(tmp_path, whole):
    with pytest.raises(OSError, match=r"No space left on device: '.*/new'"), whole(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match=r"nowhere"), whole(tmp_path / "new"):
        (tmp_path / "nowhere" / "a").read_text()
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "a.txt")


def test_no_file_stays_open(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with whole_file(tmp_path / "a.txt") as file:
            file.write_text("content")
    assert len(os.listdir("/proc/self/fd")) <= len(before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_files_have(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.txt") as file:
            file.write_text("content")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
        assert os.umask(umask) == umask  # it is as it was
    finally:
        os.umask(before)


def test_a_file_that_was_there_keeps_its_mode_and_links_to_it(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    with whole_file(link) as file:
        file.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with whole_file(pipe) as file:
        file.write_text("content")
    reader.join(10)
    assert read == ["content"]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
    with whole_file(os.devnull) as file:
        file.write_text("content")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_other_threads_files_have_their_mode_meanwhile(tmp_path):
    """The umask is the process's: it is not changed, not even to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        with whole_file(tmp_path / "a.txt") as file:
            file.write_text("content")
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text("a")


def test_a_folder_behind_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "there" / "a").read_text() == "a"


def test_links_that_go_round(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "a" / "c"):
        for write in (check_writable, lambda path: whole_file(path).__enter__()):
            with pytest.raises(OSError, match=r"'.*/a'"):
                write(path)
        with pytest.raises(OSError, match="/a"), whole_folder(path):
            pass
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: '.*/a'") as caught:
        check_writable(tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


def test_a_folder_whole_or_not_at_all(tmp_path):
    with whole_folder(tmp_path / "new" / "folder") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "new" / "folder").exists()
    assert (tmp_path / "new" / "folder" / "a").read_text() == "a"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    with pytest.raises(FileExistsError, match="is there already"), whole_folder(tmp_path / "new" / "folder"):
        pass
    with pytest.raises(IsADirectoryError), whole_folder(tmp_path / "other") as folder:
        folder.write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_what_is_not_whole_may_be_elsewhere(tmp_path):
    (tmp_path / "work").mkdir()
    with whole_file(tmp_path / "a", tmp_path / "work") as file:
        assert file.parent == tmp_path / "work"
        file.write_text("a")
    with whole_folder(tmp_path / "b", tmp_path / "work") as folder:
        assert folder.parent == tmp_path / "work"
        (folder / "c").write_text("c")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c", "work"]


def test_a_full_disk_is_one_error_whoever_writes_tensors(tmp_path):
    """A limit of a file's size stands for the disk; nothing half written is left."""
    samples = {"samples": torch.zeros(5000)}
    model = ConsistencyModel(tiny_unet()).checkpoint()
    writers = {
        "classifier.safetensors": lambda path: save_classifier(Classifier(), path),
        "packed.safetensors": lambda path: cache.write(path, samples),
        "samples.safetensors": lambda path: sample._save_numbers(samples["samples"], path),
        "model.pt": lambda path: formats.write(model, path, "openai"),
        "folder/model.safetensors": lambda path: formats.write(model, path.parent, "cmfast"),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(OSError, match=rf"File too large: '.*{name}'"):
                write(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []

    def note(descriptor):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", note)
    with whole_folder(tmp_path / "a") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text("content")
        names = [folder / "inner" / "b.txt", folder / "inner", folder]
    assert sorted(name for name, named in flushed if not named) == sorted(map(str, names))
    assert [name for name, named in flushed if named] == [str(tmp_path)]


def test_a_folder_is_held_once(tmp_path):
    first = held(tmp_path)
    with pytest.raises(BlockingIOError, match="another process is writing there"):
        held(tmp_path)
    os.close(first)
    os.close(held(tmp_path))


def test_names_as_long_as_a_file_system_has_them(tmp_path):
    path = tmp_path / f"{'n' * 120}{'ü' * 60}.png"
    check_writable(path)
    with whole_file(path) as file:
        file.write_bytes(b"x")
    assert path.read_bytes() == b"x"
    assert list(tmp_path.iterdir()) == [path]
