"""Temporary files that a killed run left behind."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

DAY = 24 * 60 * 60  # seconds


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the files and folders `folder`/`pattern` that were not written to for a day. Writing one takes minutes."""
    with suppress(OSError):
        for path in list(folder.glob(pattern)):
            with suppress(OSError):
                if time.time() - _last_written(path) < DAY:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _last_written(path: Path) -> float:
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(item.lstat().st_mtime for item in (path, *inside))
