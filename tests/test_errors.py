"""Signals, exhausted memory and dead workers become one-line errors; bugs do not."""

import signal

import pytest
import torch

from config import UserError
from tinycnn.errors import StopRequested, as_user_errors, stop_on_signals

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of GPU memory: .*--batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "^out of memory"),
    (RuntimeError("CUDA error: out of memory"), "^out of memory"),
    (MemoryError(), "^out of memory"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "^out of memory"),
    (RuntimeError("unable to write to shared memory"), "out of shared memory: use --workers 0"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a worker process was killed"),
    (RuntimeError("Too many open files. Communication with the workers"), "too many open files: .*ulimit"),
    (OSError(24, "Too many open files"), "too many open files"), (OSError(12, "Cannot allocate memory"), "^out of memory"),
    (RuntimeError("received 0 items of ancdata"), "a worker process was killed"),
    (EOFError(), "a worker process was killed"), (ConnectionResetError(), "a worker process was killed")])
def test_exhausted_memory_and_dead_workers_are_one_line(error, message):
    error.add_note("epochs 0 to 1 are safe")
    with pytest.raises(UserError, match=message) as caught, as_user_errors():
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.__notes__ == ["epochs 0 to 1 are safe"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), ImportError("no module named x"), ValueError("out of memory"),
                                 ZeroDivisionError(), OSError(28, "No space left")])
def test_bugs_pass_unchanged(bug):
    with pytest.raises(type(bug)) as caught, as_user_errors():
        raise bug
    assert caught.value is bug


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_stops_and_the_second_would_end_the_process(number):
    def outer(*_):
        """Keeps a signal that nobody catches from ending the tests."""

    before, after_first = signal.signal(number, outer), []

    def body():
        try:
            signal.raise_signal(number)
        finally:
            after_first.append(signal.getsignal(number))

    try:
        with pytest.raises(StopRequested) as caught, stop_on_signals():
            body()
        assert signal.getsignal(number) is outer
    finally:
        signal.signal(number, before)
    assert after_first == [signal.SIG_DFL]
    assert (caught.value.signal, caught.value.status) == (number, 128 + number)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signals():
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
