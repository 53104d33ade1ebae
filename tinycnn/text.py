"""Names and counts, made fit for a terminal and a log."""

from collections.abc import Collection

LISTED_NAMES = 10


def printable(text: str) -> str:
    """`text` with every character that is not printable escaped: control codes, line breaks, bytes that are not UTF-8."""
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's form of a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: 1 epoch, 2 epochs."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Collection[str]) -> str:
    """Write names as a list, sorted: at most LISTED_NAMES of them, and how many more there are."""
    more = f" and {len(names) - LISTED_NAMES:,} more" if len(names) > LISTED_NAMES else ""
    return (", ".join(sorted(names)[:LISTED_NAMES]) or "none") + more
