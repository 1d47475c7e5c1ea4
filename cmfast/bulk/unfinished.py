"""Where a process keeps what it has not finished, and how others know that it will not finish it any more.

A workplace is a hidden folder with a locked file. The lock (flock) goes with the process, however it ends, and the
kernel says on all machines that share the file system whether it is held.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _LOCK = ".unfinished-", "lock"


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Give a new folder in `folder` for what is not finished, which `clear` leaves alone within the block.

    Raises:
        OSError: it cannot be made or locked.
    """
    try:
        path, lock = _locked(folder)
    except OSError as error:
        reason = f"no folder in which files can be made ({error.strerror})"
        raise OSError(error.errno, reason, str(folder)) from error
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def clear(folder: Path) -> None:
    """Remove what processes have left that were killed; what belongs to a living one stays."""
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR)
        except FileNotFoundError:  # killed before it had a lock, or just now made; then its process makes another
            with contextlib.suppress(OSError):
                path.rmdir()
            continue
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except OSError:  # its process lives, or the file system has no locks
            pass
        finally:
            os.close(lock)


def is_unfinished(name: str) -> bool:
    """Whether a file of that name is a workplace."""
    return name.startswith(_PREFIX)


def _remove(path: Path) -> None:
    """The lock goes last: what is left by a process that is killed here can be removed as well."""
    with contextlib.suppress(OSError):
        for child in path.iterdir():
            if child.name != _LOCK:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        (path / _LOCK).unlink()
        path.rmdir()


def _locked(folder: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another process took it for a killed one's
            continue
        except OSError:
            path.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path / _LOCK)):
                return path, lock
        except (BlockingIOError, FileNotFoundError):  # the same, a moment later
            pass
        except OSError:  # a file system without locks: nobody can take it for a killed one's
            return path, lock
        os.close(lock)
