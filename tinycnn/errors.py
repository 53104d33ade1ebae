"""Signals, exhausted memory and dead workers as one-line errors. Needs no torch: errors are shown before it is loaded."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from config import UserError

FREE_MEMORY = "close other programs; to train with less, start a new run with a smaller --batch-size"
NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "failed to map segment",
             "without exception set", "without setting an")  # the last two: a C library got none to say so
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Diverged(UserError):
    """The loss is no longer a finite number."""


class StopRequested(BaseException):
    """SIGINT, SIGTERM or SIGHUP asked the program to end. Like KeyboardInterrupt, not an Exception, so that nothing swallows
    it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.status = 128 + number


def raise_stop(number: int) -> None:
    """Raise StopRequested."""
    raise StopRequested(number)


@contextmanager
def stop_on_signals(action: Callable[[int], object] = raise_stop) -> Iterator[None]:
    """In the body, call `action` with the number of the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at
    once. Signals that are ignored, as nohup and `trap '' INT` have it, stay so."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        action(number)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Raise UserError in place of what exhausted memory, too few file descriptors or a killed worker raise in the body. Other
    errors pass unchanged."""
    try:
        yield
    except Exception as error:
        message = _machines_fault(error)
        if message is None:
            raise
        user_error = UserError(message)
        user_error.__notes__ = getattr(error, "__notes__", [])  # what is safe, how to resume
        raise user_error from error


def user_message(error: BaseException) -> str | None:
    """The line for what a user can fix, None for a bug. An OSError that nobody foresaw names its file itself."""
    return _machines_fault(error) or (str(error) if isinstance(error, UserError | OSError) else None)


def _machines_fault(error: BaseException) -> str | None:
    """The line for what is the machine's fault. PyTorch has few classes of its own for it, so most are known by their text."""
    if not isinstance(error, EOFError | OSError | MemoryError | RuntimeError | SystemError | ImportError):
        return None
    text = str(error)
    if isinstance(error, BrokenPipeError):  # whoever read the output has gone; a dead worker resets its connection
        return None
    if isinstance(error, EOFError | ConnectionError) or text.startswith("DataLoader worker (pid") or "ancdata" in text:
        return "a worker process was killed, most likely for lack of memory: lower --workers"
    if "Too many open files" in text:
        return "too many open files: allow more (ulimit -n 4096), or use --workers 0"
    if "shared memory" in text:
        return "out of shared memory: use --workers 0, or give the container more of it (--shm-size)"
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"out of GPU memory: {FREE_MEMORY}"
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return f"out of memory: {FREE_MEMORY}"
    return None
