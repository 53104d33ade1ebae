"""TensorBoard event files: the figures of a run's log, an epoch a step."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError
from training.records import Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def check_package() -> None:
    """Raise UserError where the package tensorboard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: python -m pip install tensorboard") from error


@contextmanager
def event_files(wanted: bool, folder: Path, epoch: int) -> Iterator["SummaryWriter | None"]:
    """A writer of event files into `folder`, from `epoch` on: what an earlier one wrote of that epoch and later ones no longer
    counts. None where none is wanted."""
    if not wanted:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    told, threading.excepthook = threading.excepthook, lambda _: None  # its thread's errors come here too, when it is flushed
    try:
        with SummaryWriter(str(folder), purge_step=epoch) as writer:
            yield writer
    finally:
        threading.excepthook = told


def write_row(writer: "SummaryWriter | None", row: Row) -> None:
    """A row of the log as TensorBoard's scalars `loss/train`, `accuracy/test` and so on."""
    if writer is None:
        return
    for name, value in row.items():
        split, _, figure = name.rpartition("_")
        if name != "epoch" and value == value:  # nan: not measured
            writer.add_scalar(f"{figure.replace('acc', 'accuracy')}/{split}" if split else name, value, int(row["epoch"]))
    writer.flush()
