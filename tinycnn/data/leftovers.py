"""Temporary files that a killed run left behind."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

DAY = 24 * 60 * 60  # seconds


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the files and folders `folder`/`pattern` that were begun more than a day ago. Writing one takes minutes."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime < DAY:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
