"""TensorBoard event files: the figures of a run's log, an epoch a step."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError
from tinycnn.runs.log import Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_tensorboard() -> None:
    """Raise UserError where the package tensorboard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: python -m pip install tensorboard") from error


@contextmanager
def event_writer(wanted: bool, folder: Path, rows: Sequence[Row]) -> Iterator["SummaryWriter | None"]:
    """A writer of event files into `folder`, or None. `rows` are the epochs so far. The last one is written again, in place of
    its events and all later ones: a crash may have come between the row and its events."""
    if not wanted:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    hook, threading.excepthook = threading.excepthook, lambda _: None  # its thread's errors come here too, when it is flushed
    try:
        with SummaryWriter(str(folder), purge_step=max(0, len(rows) - 1)) as writer:
            for row in rows[-1:]:
                write_events(writer, row)
            yield writer
    finally:
        threading.excepthook = hook


def write_events(writer: "SummaryWriter | None", row: Row) -> None:
    """Write an epoch's row of the log as the scalars `loss/train`, `accuracy/test` and so on."""
    if writer is None:
        return
    for name, value in row.items():
        split, _, figure = name.rpartition("_")
        if name != "epoch" and value == value:  # nan: not measured
            writer.add_scalar(f"{figure.replace('acc', 'accuracy')}/{split}" if split else name, value, int(row["epoch"]))
    writer.flush()
