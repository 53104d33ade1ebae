"""Signals, exhausted memory and dead workers as one-line errors."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from config import UserError

FREE_MEMORY = "close other programs; to train with less, start a new run with a smaller --batch-size"
WORKER_KILLED = "a worker process was killed, most likely for lack of memory: lower --workers"
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
    """Call `action` with its number at the first SIGINT, SIGTERM or SIGHUP in the body. A second one ends the process at
    once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        action(number)

    # nohup has SIGHUP ignored, and it must stay so
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS
              if each.name != "SIGHUP" or signal.getsignal(each) is not signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, stop)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Raise UserError in place of what exhausted memory or a killed worker raises in the body. Bugs pass unchanged."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has gone; a dead worker resets its connection
        raise
    except (EOFError, ConnectionError, MemoryError, RuntimeError, SystemError, ImportError) as error:
        message = _user_message(error)
        if message is None:
            raise
        user_error = UserError(message)
        for note in getattr(error, "__notes__", []):  # what is safe, how to resume
            user_error.add_note(note)
        raise user_error from error


def _user_message(error: Exception) -> str | None:
    """The line for the user. PyTorch has few classes of its own for these errors, so most are known by their text."""
    text = str(error)
    if isinstance(error, EOFError | ConnectionError):  # a worker's batch was on its way
        return WORKER_KILLED
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported, because errors are shown before torch is loaded
        return f"out of GPU memory: {FREE_MEMORY}"
    if "shared memory" in text:
        return "out of shared memory: use --workers 0, or give the container more of it (--shm-size)"
    if text.startswith("DataLoader worker (pid") or "ancdata" in text:
        return WORKER_KILLED
    no_memory = {SystemError: ("without exception set", "without setting an"),  # a C library's, which got no memory to say so
                 ImportError: ("failed to map segment",), RuntimeError: ("can't allocate memory", "out of memory")}
    if isinstance(error, MemoryError) or any(isinstance(error, kind) and any(words in text for words in phrases)
                                             for kind, phrases in no_memory.items()):
        return f"out of memory: {FREE_MEMORY}"
    return None
