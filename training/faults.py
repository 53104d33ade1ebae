"""What can befall a run from outside, turned into exceptions that end it with one line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from config import UserError


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
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory ran out: lower --batch-size, or free memory that other programs hold") from error
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("DataLoader worker (pid"):  # PyTorch's words; there is no class of its own for it
            raise UserError("a worker process was killed, most likely because memory ran out: lower --workers") from error
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UserError("memory ran out: lower --batch-size or --workers") from error
        raise
