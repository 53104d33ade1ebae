"""What can befall a run from outside, turned into exceptions that end it with one line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from config import UserError

MORE_MEMORY = "free some that other programs hold, or start a new run with a smaller --batch-size"
WORKER_KILLED = "a worker process was killed, most likely because memory ran out: lower --workers"


class Diverged(UserError):
    """The loss is no longer a finite number."""


class Stopped(BaseException):
    """SIGINT or SIGTERM asked the program to end. Like KeyboardInterrupt, no Exception, so that nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.status = 128 + number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Stopped in here, once; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def named_faults() -> Iterator[None]:
    """A killed worker and memory that ran out raise UserError in here; bugs pass as they are."""
    import torch  # here, because what needs no torch imports this file too

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory ran out: {MORE_MEMORY}") from error
    except (EOFError, ConnectionError) as error:  # a worker's batch was on its way
        raise UserError(WORKER_KILLED) from error
    except (MemoryError, RuntimeError) as error:
        said = str(error)  # PyTorch has no classes of their own for these
        if "shared memory" in said:
            raise UserError("shared memory ran out: use --workers 0, or give the container more of it (--shm-size)") from error
        if said.startswith("DataLoader worker (pid") or "ancdata" in said:
            raise UserError(WORKER_KILLED) from error
        if isinstance(error, MemoryError) or "can't allocate memory" in said or "out of memory" in said:
            raise UserError(f"memory ran out: {MORE_MEMORY}") from error
        raise
