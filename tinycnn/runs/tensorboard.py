"""TensorBoard event files: the figures of a run's log, an epoch a step."""

import threading
from collections.abc import Sequence
from pathlib import Path

from tinycnn.packages import require
from tinycnn.runs.log import Row


def check_tensorboard() -> None:
    """Raise UserError where the package tensorboard is missing or broken."""
    require("--tensorboard", "tensorboard", modules=("torch.utils.tensorboard",))


class Events:
    """Writes event files into `folder`, if they are wanted. `rows` are the epochs so far. The last one is written again, in
    place of its events and all later ones: a crash may have come between the row and its events."""

    def __init__(self, wanted: bool, folder: Path, rows: Sequence[Row]) -> None:
        self.writer = None
        if wanted:
            from torch.utils.tensorboard import SummaryWriter  # an optional package

            # errors of its thread come here too, when it is flushed
            self.hook, threading.excepthook = threading.excepthook, lambda _: None
            self.writer = SummaryWriter(str(folder), purge_step=max(0, len(rows) - 1))
            for row in rows[-1:]:
                self.write(row)

    def write(self, row: Row) -> None:
        """Write an epoch's row of the log as the scalars `loss/train`, `accuracy/test` and so on."""
        if self.writer is None:
            return
        for name, value in row.items():
            split, _, figure = name.rpartition("_")
            if name != "epoch" and value == value:  # nan: not measured
                tag = f"{figure.replace('acc', 'accuracy')}/{split}" if split in ("train", "val", "test") else name
                self.writer.add_scalar(tag, value, int(row["epoch"]))
        self.writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            try:
                self.writer.close()
            finally:
                threading.excepthook = self.hook
