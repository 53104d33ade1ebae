"""What the start of the program takes, part by part, until the first training step has been launched."""

import time

_began = _marked = time.perf_counter()
_parts: list[str] = []
_ended = False


def mark(part: str) -> None:
    """Note that this part of the start, which began when the one before ended, has ended."""
    global _marked
    if not _ended:
        now = time.perf_counter()
        _parts.append(f"{part} {now - _marked:.1f}")
        _marked = now


def end() -> None:
    """Note that the first step has been launched. Later calls change nothing."""
    global _ended
    mark("first step")
    _ended = True


def line() -> str:
    """A line for the log; empty after it was asked for once."""
    text = f"start: {_marked - _began:.1f} s ({', '.join(_parts)})" if _parts else ""
    _parts.clear()
    return text
