"""Claim a run before it is begun, so that two sweeps at once don't train it twice."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinycnn.data.leftovers import DAY
from tinycnn.runs.files import lock_file, unwritable

CLAIMS = ".claims"  # the folder in `log_dir`/runs; its dot hides it from find_runs


@contextmanager
def claim(log_dir: Path, key: str) -> Iterator[bool]:
    """Claim the run called `key` for the body. Yields False where another process holds the claim.

    The claim is a lock of the system's, which ends with this process at the latest.
    """
    path = log_dir / "runs" / CLAIMS / f"{key}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path)
        if lock:
            os.utime(path)  # the age of a claim is that of its newest holder
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield lock is not None
    finally:
        if lock:
            lock.release()


def remove_stale_claims(log_dir: Path) -> None:
    """Remove the claim files that are older than a day and that nobody holds."""
    for path in (log_dir / "runs" / CLAIMS).glob("*.lock"):
        with contextlib.suppress(OSError):  # another process was quicker
            if time.time() - path.stat().st_mtime > DAY and (lock := lock_file(path)):
                path.unlink()  # whoever opened it meanwhile sees that it is gone
                lock.release()
