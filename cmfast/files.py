"""Writing files and folders whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | Path, within: Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` when the block succeeds.

    The folder is made where it is missing. When the block raises, nothing is left of what it wrote. The temporary path
    is in the folder `within` where that is given, which must be of the same file system, and nothing is made then.
    A file that was there keeps its mode; a link stays one, to the new file; what is no file, such as a pipe or
    `/dev/null`, stays what it is, and is written to when the block succeeds.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    if within is None:
        check_writable(path)
    is_special = _is_special(path)
    if not is_special:
        path = _resolved(path)
    temporary = _unused(path, Path(tempfile.gettempdir()) if is_special else within)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE((temporary if is_special or not path.exists() else path).stat().st_mode)
    try:
        yield temporary
        if is_special:
            with temporary.open("rb") as made, path.open("wb") as to:
                shutil.copyfileobj(made, to)
        else:
            temporary.chmod(mode)
            temporary.replace(path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path, within: Path | None = None) -> Iterator[Path]:
    """Give a temporary folder beside `path` to write to; it takes the place of `path` when the block succeeds.

    The folder of `path` is made where it is missing. When the block raises, nothing is left of what it wrote. The
    temporary folder is in the folder `within` where that is given; it must be of the same file system.

    Raises:
        FileExistsError: `path` is there, and is not an empty folder.
        OSError: the folder cannot be made or written to.
    """
    path = _resolved(Path(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already: a folder is written to a new name, or to an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unused(path, within)
    temporary.mkdir()
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            flush(file)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise _outside(named(error, path), temporary, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def held(folder: Path) -> int:
    """Lock a folder for this process alone, for as long as the file descriptor that is returned is open.

    Raises:
        BlockingIOError: another process has it.
    """
    import fcntl  # which Windows has not, where what needs no lock is used too

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(f"{folder}: another process is writing there") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk, so that a power failure does not leave less of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def named(error: OSError, path: str | Path) -> OSError:
    """The error, with the path where it names no file: a full disk is noticed by a write, which knows none."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


def _outside(error: OSError, temporary: Path, path: Path) -> OSError:
    """The error, with the name that a file in the temporary folder would have had."""
    if error.filename is None or not Path(error.filename).is_relative_to(temporary):
        return error
    return OSError(error.errno, error.strerror, str(path / Path(error.filename).relative_to(temporary)))


def check_writable(path: str | Path) -> None:
    """Make the folder of `path`, and raise OSError where a file could not be written there (before long work)."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    path = _resolved(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = f"no folder in which {path.name} can be written ({error.strerror})"
        raise OSError(error.errno, reason, str(path.parent)) from error


def _resolved(path: Path) -> Path:
    """The path that a path with links in it leads to; OSError where they go round in a loop."""
    resolved = Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a loop, or since Python 3.13 nothing
    if resolved.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return resolved


def _is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder: a pipe, a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _unused(path: Path, within: Path | None) -> Path:
    """A hidden name that nobody has, beside `path` or in the folder `within`."""
    stem = path.stem.encode()[:200].decode(errors="ignore")  # a name has 255 bytes at most
    return (within or path.parent) / f".{stem}-{secrets.token_hex(6)}{path.suffix}"
