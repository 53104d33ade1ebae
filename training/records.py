"""The records of a run: its folder, the logs in it and their copies above it, and the one reader of them."""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, UserError

ACCURACY_LOG, SUMMARY_LOG = "model_accuracy.log", "torch_summary.log"
CONFIG, SUMMARY = "config.json", "summary.json"
FINAL = "final.safetensors"
FORMATS = {
    "epoch": "d", "lr": ".6f", "train_loss": ".4f", "train_acc": ".2f", "val_loss": ".4f", "val_acc": ".2f",
    "test_loss": ".4f", "test_acc": ".2f", "seconds": ".2f",
}
DATE = "%Y-%m-%d_%H-%M-%S"  # how a run's folder is called; its --name follows
TEMPORARY = ".tmp-"  # how the names of half-written files begin
PLACES = ("data_dir", "log_dir")  # where things lie on one machine is no part of what a run is, and stays out of logs
Row = dict[str, float]


# ---------------------------------------------------------------- writing

def write(path: Path, data: bytes | str, durable: bool = False) -> None:
    """Replace the file `path` by `data` in one step: a reader, or a crash, meets the old file or the new one, whole.
    `durable` waits until the disk has it. Raises UserError when it can't be written; the old file is then as it was."""
    beside = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        try:
            with open(beside, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} could not be written ({error.strerror}): make room or give write permission, "
                     "or choose another --log-dir")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a loss of power, where the system can (Windows can't open folders)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def new_folder(log_dir: Path, name: str, files: Mapping[str, bytes | str]) -> Path:
    """Make `log_dir`/runs/<date>[-name] with `files` in it: all at once, under a name that no other run has.

    The folder is filled under a hidden name and renamed, which the system refuses where the name is taken by another
    folder that is not empty; then a counter is put behind it. Raises UserError when it can't be made.
    """
    runs = log_dir / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(dir=runs, prefix=".new-"))
        hidden.chmod(0o755)
    except OSError as error:
        raise unwritable(runs, error) from error
    try:
        for file, data in files.items():
            write(hidden / file, data, durable=True)
        stem = time.strftime(DATE) + (f"-{name}" if name else "")
        for count in range(1, 1000):
            try:
                folder = hidden.rename(runs / (stem if count == 1 else f"{stem}-{count}"))
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES):  # the last one is Windows'
                    raise unwritable(runs, error) from error
            else:
                sync_folder(runs)
                return folder
        raise UserError(f"no folder for the run could be made in {runs}: all names from {stem} on are taken")
    finally:
        if hidden.exists():
            for left in hidden.iterdir():
                left.unlink()
            hidden.rmdir()


class Log:
    """The model_accuracy.log of one run, in the run's folder and as a copy in the log folder above: `record` is what
    config.json holds, `rows` the figures of its epochs so far, `log_dir` the folder of the copies.

    The copy is that of the run started last: another run that starts takes it over, and this one then leaves it alone.
    """

    def __init__(self, folder: Path, log_dir: Path, record: dict[str, Any], rows: list[Row]) -> None:
        self.folder, self.log_dir, self.record, self.rows = folder, log_dir, record, rows
        self.comments = comments(folder.name, record)

    def start(self, summary: str) -> None:
        """Write the log so far, and take over the copies in the log folder; `summary` is torch_summary.log's text.
        Raises UserError when that can't be done."""
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.log_dir, error) from error
        write(self.folder / CONFIG, as_json(self.record))
        for name, text in ((ACCURACY_LOG, self.text()), (SUMMARY_LOG, summary)):
            write(self.folder / name, text)
            write(self.log_dir / name, text)

    def update(self, durable: bool = False) -> None:
        """Write the log, and the copy if it is still this run's. Raises UserError when that can't be done."""
        write(self.folder / ACCURACY_LOG, self.text(), durable)
        above = self.log_dir / ACCURACY_LOG
        if above.exists() and above.read_bytes().startswith(f"# {self.comments[0]}\n".encode()):
            write(above, self.text())

    def text(self) -> str:
        return "".join(f"# {line}\n" for line in self.comments) + table(self.rows, self.columns())

    def columns(self) -> list[str]:
        """The log's columns: those of a validation only where there is one."""
        return [name for name in FORMATS if self.record["config"]["validation"] or not name.startswith("val_")]

    def header(self) -> str:
        return table([], self.columns()).rstrip("\n")

    def last_row(self) -> str:
        return table(self.rows[-1:], self.columns()).splitlines()[1]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A header row and one aligned row an epoch: with all columns just the 80 characters of a terminal's line."""
    cells = [columns, *([format(row[name], FORMATS[name]) for name in columns] for row in rows)]
    widths = [8 if name in ("lr", "seconds") else len(name) for name in columns]
    return "".join(" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + "\n" for line in cells)


def comments(name: str, record: dict[str, Any]) -> list[str]:
    """The `#` lines of the log of the run called `name`."""
    data, network, machine = record["dataset"], record["network"], record["machine"]
    field = network["receptive_field"]
    lines = [
        f"run: {name}",
        f"dataset: {data['kind']}, {data['train']:,} training, {data['validation']:,} validation and {data['test']:,} "
        f"test images, {len(data['class_names'])} classes",
        "normalization: mean " + " ".join(f"{value:.4f}" for value in data["mean"])
        + ", standard deviation " + " ".join(f"{value:.4f}" for value in data["deviation"]),
        "config: " + " ".join(f"{key}={value!r}" for key, value in record["config"].items()),
        f"network: {network['parameters']:,} parameters, {network['multiply_adds']:,} multiply-adds, "
        f"receptive field {field if field else 'unknown'}",
        f"device: {machine['device']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    if data["kind"] == "synthetic":
        lines.insert(1, "DEMONSTRATION on built-in drawn shapes: no figure here says anything about CIFAR-10")
    return lines + record["notes"]


def record(config: Config, network: Mapping[str, Any], dataset: Mapping[str, Any], device: str,
           teacher: str = "") -> dict[str, Any]:
    """What config.json holds: the settings, with `teacher` for what it was called by, and what they ran on. `notes` is what
    befell the run since."""
    import cv2
    import numpy
    import torch
    import torchvision

    versions = {"python": platform.python_version()}
    versions |= {package.__name__: str(package.__version__) for package in (torch, torchvision, cv2, numpy)}
    return {
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key not in PLACES} | {"teacher": teacher},
        "network": dict(network), "dataset": dict(dataset),
        "machine": {"device": device, "system": platform.system()},
        "versions": versions | {"albumentations": importlib.metadata.version("albumentations")},
        "notes": [],
    }


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


# ---------------------------------------------------------------- reading

@dataclass(frozen=True)
class Run:
    """A run as its folder tells it: `record` is config.json, `rows` the log, `summary` the final figures or None."""

    folder: Path
    record: dict[str, Any]
    comments: list[str]
    rows: list[Row]
    summary: dict[str, Any] | None


def read_run(folder: Path) -> Run:
    """The one reader of a run's folder. Raises UserError naming the file that is missing or damaged."""
    comments, rows = read_log(folder / ACCURACY_LOG)
    finished = (folder / SUMMARY).exists()
    return Run(folder, read_record(folder), comments, rows,
               _read_json(folder / SUMMARY) if finished else None)


def read_record(folder: Path) -> dict[str, Any]:
    """A run's config.json. Raises UserError when it is missing or damaged."""
    return _read_json(folder / CONFIG)


def read_log(path: Path) -> tuple[list[str], list[Row]]:
    """The `#` lines and the rows of a model_accuracy.log. Raises UserError when it is missing or damaged."""
    lines = _read_text(path).splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    cells = [line.split() for line in lines if line and not line.startswith("#")]
    header = cells[0] if cells else []
    known = [name for name in FORMATS if name in header]
    if header != known or "epoch" not in header or any(len(line) != len(header) for line in cells[1:]):
        raise UserError(f"{path} is no whole log of a run: its table is damaged")
    try:
        rows = [{name: int(cell) if name == "epoch" else float(cell) for name, cell in zip(header, line, strict=True)}
                for line in cells[1:]]
    except ValueError as error:
        raise UserError(f"{path} is no whole log of a run: {error}") from error
    if [row["epoch"] for row in rows] != list(range(len(rows))):
        raise UserError(f"{path} is no whole log of a run: its epochs don't follow one another")
    return comments, rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def find_runs(log_dir: Path) -> list[Path]:
    """The folders of runs, newest first."""
    runs = log_dir / "runs"
    if not runs.is_dir():
        return []
    return sorted((p for p in runs.iterdir() if p.is_dir() and not p.name.startswith(".")), reverse=True)


def named_runs(log_dir: Path, name: str) -> list[Path]:
    """The folders of the runs that a person calls `name`, newest first: one in `log_dir`/runs by its folder's name, all that
    were given this --name, or one by its path. Raises UserError where there is none."""
    found = [folder for folder in find_runs(log_dir) if name == folder.name or (name in folder.name and name == _given(folder))]
    if not name or not (found or Path(name).is_dir()):
        raise UserError(f"there is no run {name!r}: neither a folder or a --name in {log_dir / 'runs'} nor a path to one")
    return [folder.resolve() for folder in found or [Path(name)]]


def _given(folder: Path) -> str:
    """The --name that the run was given. (Behind it the folder's name may have a counter.)"""
    try:
        return str(read_record(folder)["config"]["name"])
    except (UserError, KeyError, TypeError):  # a foreign folder
        return ""


def summarize(rows: Sequence[Row]) -> dict[str, float | int]:
    """The final figures of a finished run, for summary.json: the last row's, and the seconds of all epochs."""
    last = {name: value for name, value in rows[-1].items() if name not in ("epoch", "lr", "seconds")}
    return {"epochs": len(rows)} | {k: v for k, v in last.items() if not math.isnan(v)} | {
        "seconds": round(math.fsum(row["seconds"] for row in rows), 2)}
