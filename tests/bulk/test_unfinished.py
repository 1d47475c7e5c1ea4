import fcntl
import os
import time

import pytest

from cmfast.bulk.unfinished import clear, is_unfinished, workplace

from .models import files
from .processes import kill, start, wait


def leave(folder):
    """Be killed with something unfinished."""

    def work():
        with workplace(folder) as unfinished:
            (unfinished / "a.npz").write_bytes(b"half")
            (unfinished / "folder").mkdir()
            (unfinished / "folder" / "a.png").write_bytes(b"half")
            time.sleep(60)

    return start(work)


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_workplace_is_gone_after_its_block(tmp_path):
    with workplace(tmp_path) as unfinished:
        assert unfinished.parent == tmp_path
        assert is_unfinished(unfinished.name)
        (unfinished / "a").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), workplace(tmp_path) as unfinished:
        (unfinished / "none" / "a").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed_and_the_rest_stays(tmp_path):
    (tmp_path / "00000000.npz").write_bytes(b"whole")
    processes = [leave(tmp_path), leave(tmp_path)]
    until(lambda: [path.read_bytes() for path in tmp_path.glob(".*/folder/a.png")] == [b"half"] * 2)
    before = files(tmp_path)
    clear(tmp_path)
    assert files(tmp_path) == before  # both live
    kill(processes[0])
    clear(tmp_path)
    left = files(tmp_path)
    assert left.items() < before.items()
    assert len(left) == 4  # the whole file, and of the living process the lock and two files
    kill(processes[1])
    clear(tmp_path)
    assert files(tmp_path) == {"00000000.npz": b"whole"}


def test_one_without_a_lock_is_removed_where_it_is_empty(tmp_path):
    (tmp_path / ".unfinished-a").mkdir()
    (tmp_path / ".unfinished-b").mkdir()
    (tmp_path / ".unfinished-b" / "a").write_bytes(b"x")
    clear(tmp_path)
    assert list(files(tmp_path)) == [".unfinished-b/a"]


@pytest.mark.parametrize("moment", ["made", "opened", "locked"])
def test_a_new_workplace_that_is_taken_for_a_killed_ones(tmp_path, monkeypatch, moment):
    """Between its folder, its file and its lock, another process may look: then it is made again."""
    looked = []
    opened, flock = os.open, fcntl.flock

    def look(when):
        if when == moment and not looked:
            looked.append(when)
            assert wait(start(lambda: clear(tmp_path))) == 0

    def open_(*arguments):
        look("made")
        handle = opened(*arguments)
        look("opened")
        return handle

    def lock(*arguments):
        flock(*arguments)
        look("locked")

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(fcntl, "flock", lock)
    with workplace(tmp_path) as unfinished:
        assert looked == [moment]
        monkeypatch.undo()
        clear_in_another = start(lambda: clear(tmp_path))
        assert wait(clear_in_another) == 0
        (unfinished / "a").write_bytes(b"x")
        assert [p.name for p in tmp_path.iterdir()] == [unfinished.name]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workplace(tmp_path) as unfinished:
        clear(tmp_path)  # nobody can know
        assert unfinished.exists()
    assert list(tmp_path.iterdir()) == []


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with workplace(tmp_path):
            clear(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
