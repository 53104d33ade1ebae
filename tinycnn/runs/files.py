"""Write files atomically; lock them; make folders all at once; remove what killed processes left behind."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from config import UserError
from tinycnn.data.leftovers import remove_leftovers

TEMPORARY = ".tmp-"  # how the names of half-written files begin
UNNAMED = ".new-"  # how the names of half-made run folders begin


class NoFileLocks(UserError):
    """The file system has no file locks."""


def write(path: Path, data: bytes | str, durable: bool = False) -> None:
    """Replace the file `path` by `data` atomically: a reader or a crash finds the whole old file or the whole new one.

    `durable` waits until the data is on the disk. Where writing fails, the old file stays as it was.
    """
    beside = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        try:
            with open(beside, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """The error to raise when `path` can't be written."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path.parent} is gone: something deleted it while the program was running; start again")
    return UserError(f"{path} could not be written ({error.strerror}): make room, give write permission, "
                     "or choose another --log-dir")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power, where the system can (Windows can't open folders)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock_file(path: Path, seconds: float = 0.1) -> FileLock | None:
    """Lock `path`, which is made if it isn't there; None where another process holds the lock for so many seconds.

    The lock lasts until it is released, or this process ends.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)  # with 0, a free lock is now and then refused
    except Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise unwritable(path, error) from error
        raise NoFileLocks(f"the file system of {path.parent} has no file locks ({getattr(error, 'strerror', error)}), without "
                          "which two programs could train the same run: choose another --log-dir") from error
    return lock


def make_run_folder(log_dir: Path, stem: str, files: Mapping[str, bytes | str]) -> Path:
    """Make the folder `log_dir`/runs/`stem` with `files` in it, atomically. Where the name is taken, a counter follows it.

    The folder is filled under a hidden name and then renamed: the system refuses a name that another folder has.
    """
    runs = log_dir / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        hidden = runs / f"{UNNAMED}{secrets.token_hex(8)}"
        hidden.mkdir()  # with the user's umask, which mkdtemp ignores
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:  # below /proc; a file, or a link to nowhere
        raise UserError(f"the folder {runs} can't be made ({error.strerror}): choose another --log-dir") from error
    except OSError as error:
        raise unwritable(runs / stem, error) from error
    try:
        for name, data in files.items():
            write(hidden / name, data, durable=True)
        for count in range(1, 1000):
            try:
                folder = hidden.rename(runs / (stem if count == 1 else f"{stem}-{count}"))
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES):  # the last one is Windows'
                    raise unwritable(runs / stem, error) from error
            else:
                sync_folder(runs)
                return folder
        raise UserError(f"{runs} has 999 runs called {stem}: choose another --name")
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # not there any more, once renamed


def remove_run_leftovers(log_dir: Path) -> None:
    """Remove half-written files and half-made run folders in `log_dir` that killed processes left more than a day ago."""
    for pattern in (f"{TEMPORARY}*", f"runs/{UNNAMED}*", f"runs/*/{TEMPORARY}*"):
        remove_leftovers(log_dir, pattern)
