"""model_accuracy.log: comment lines, a header row, and an aligned row for each epoch."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config, UserError
from tinycnn.runs.files import unwritable, write
from tinycnn.text import printable

ACCURACY_LOG, SUMMARY_LOG = "model_accuracy.log", "torch_summary.log"
FORMATS = {
    "epoch": "d", "lr": ".6f", "train_loss": ".4f", "train_acc": ".2f", "val_loss": ".4f", "val_acc": ".2f",
    "test_loss": ".4f", "test_acc": ".2f", "seconds": ".2f",
}
WIDTH = 80  # columns of a terminal
NEEDED = set(FORMATS) - {"val_loss", "val_acc"}
Row = dict[str, float]  # one epoch: a value for each column; accuracies in percent, losses in nats per image


class AccuracyLog:
    """The log of one run: in the run's folder, and as a copy in the log folder.

    The copy belongs to the run started last. Another run that starts takes it over, and this one then leaves it alone.
    """

    def __init__(self, folder: Path, log_dir: Path, record: dict[str, Any], rows: list[Row]) -> None:
        """`record` is the content of config.json, `rows` the epochs so far."""
        self.folder, self.log_dir, self.rows = folder, log_dir, rows
        self.comments = comments(folder.name, record)
        self.validation = bool(record["config"]["validation"])

    @property
    def columns(self) -> list[str]:
        """The columns of the table: those of a validation only where there is one, and those that main.py has added."""
        added = dict.fromkeys(name for row in self.rows for name in row if name not in FORMATS)
        there = {name for row in self.rows for name in row}
        known = [name for name in FORMATS if self.validation or name in there or not name.startswith("val_")]
        return [*known[:-1], *added, known[-1]]

    def start(self, network_summary: str) -> None:
        """Write the log so far and torch_summary.log, and take over the copies in the log folder."""
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.log_dir, error) from error
        for folder in (self.folder, self.log_dir):
            write(folder / ACCURACY_LOG, self.text())
            write(folder / SUMMARY_LOG, network_summary)

    def update(self, durable: bool = False) -> None:
        """Write the log, and its copy if that is still this run's."""
        write(self.folder / ACCURACY_LOG, self.text(), durable)
        copy = self.log_dir / ACCURACY_LOG
        if copy.exists() and copy.read_bytes().startswith(f"# {self.comments[0]}\n".encode()):
            write(copy, self.text())

    def text(self) -> str:
        """The content of the file."""
        return "".join(f"# {line}\n" for line in self.comments) + table(self.rows, self.columns)

    def heading(self) -> str:
        """The comments for a terminal of WIDTH columns; the file has more."""
        lines = [line for line in self.comments if not line.startswith(("normalization: ", "versions: "))]
        return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)

    def header(self) -> str:
        """The header row, for a terminal."""
        return table([], self.columns).rstrip("\n")

    def last_row(self) -> str:
        """The last epoch's row, for a terminal: "-" for what was not measured."""
        return table(self.rows[-1:], self.columns, missing="-").splitlines()[1]


def table(rows: Sequence[Row], columns: Sequence[str], missing: str = "nan") -> str:
    """A header row and an aligned row for each epoch. All columns together take 80 characters, the width of a terminal."""
    widths = [max(8 if name in ("lr", "seconds") or name not in FORMATS else 0, len(name)) for name in columns]
    cells = [columns, *([_cell(row.get(name, math.nan), FORMATS.get(name, ".4g"), missing) for name in columns]
                        for row in rows)]
    return "".join(" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + "\n" for line in cells)


def _cell(value: float, form: str, missing: str) -> str:
    """A value of at most nine characters, so that a loss of 25 digits stays in its column."""
    text = missing if math.isnan(value) else format(value, form)
    return text if len(text) < 10 else format(value, ".2e")


def comments(name: str, record: dict[str, Any]) -> list[str]:
    """The comment lines of the log of the run called `name`, without the leading "# "."""
    data, network, machine = record["dataset"], record["network"], record["machine"]
    defaults = vars(Config())
    changed = [f"{key}={value!r}" for key, value in record["config"].items()
               if key != "dataset" and value != defaults.get(key)]
    lines = [
        f"run: {name}",
        f"dataset: {data['kind']}, {data['train']:,} training, {data['validation']:,} validation and {data['test']:,} "
        f"test images, {len(data['class_names'])} classes",
        "normalization: mean " + " ".join(f"{value:.4f}" for value in data["mean"])
        + ", standard deviation " + " ".join(f"{value:.4f}" for value in data["deviation"]),
        f"config: {' '.join(changed)} (all others are defaults; config.json has them all)",
        f"network: {network['parameters']:,} parameters, {network['multiply_adds']:,} multiply-adds, "
        f"receptive field {network['receptive_field'] or 'unknown'}",
        "device: " + machine["device"] + (f", {machine['instruction_set']}" if "instruction_set" in machine else "")
        + (f", {machine['processes']} processes" if "processes" in machine else ""),
        "versions: " + ", ".join(f"{package} {version}" for package, version in record["versions"].items()),
    ]
    if data["kind"] == "synthetic":
        lines.insert(1, "DEMONSTRATION on built-in drawn shapes: no figure here says anything about CIFAR-10")
    if "processes" in machine and machine["device"].startswith("cpu"):
        lines.append("BatchNorm uses the statistics of each process in training; the running statistics of the first are saved")
    return [printable(line) for line in lines + record["notes"]]  # one line each, whatever a folder is called


def read_log(path: Path) -> tuple[list[str], list[Row]]:
    """The comment lines and the rows of a model_accuracy.log."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    comment_lines = [line[2:] for line in lines if line.startswith("# ")]
    cells = [line.split() for line in lines if line and not line.startswith("#")]
    header = cells[0] if cells else []
    known = [name for name in FORMATS if name in header]
    if not set(header) >= NEEDED or [name for name in header if name in FORMATS] != known or len(set(header)) < len(header):
        raise UserError(f"{path} is not a complete log of a run: its table is damaged")
    try:
        rows = [{name: int(cell) if name == "epoch" else float(cell) for name, cell in zip(header, line, strict=True)}
                for line in cells[1:]]
    except ValueError as error:
        raise UserError(f"{path} is not a complete log of a run: {error}") from error
    check_rows(rows, path)
    return comment_lines, rows


def check_rows(rows: object, path: Path) -> None:
    """Raise UserError unless `rows`, read from `path`, are those of a run."""
    if not isinstance(rows, list) or not all(_is_row(row) and row["epoch"] == epoch for epoch, row in enumerate(rows)):
        raise UserError(f"{path} is damaged: its rows are not the epochs of a run")


def _is_row(row: object) -> bool:
    """Whether `row` has the columns of a row, and maybe more; nan stands for what was not measured."""
    if not isinstance(row, dict) or not row.keys() >= NEEDED:
        return False
    if type(row["epoch"]) is not int or not all(type(value) in (int, float) for value in row.values()):
        return False
    return all(math.isnan(value) or (0 <= value <= 100 if name.endswith("_acc") else abs(value) < math.inf)
               for name, value in row.items() if name in FORMATS)  # a loss of the user's own may be negative
