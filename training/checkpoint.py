"""Save a run after its epochs, and take it up again: atomically, checked, and without running code from the file."""

import dataclasses
import hashlib
import io
import os
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from config import Config, UserError
from training.faults import Diverged
from training.records import SUMMARY, TEMPORARY, Log, find_runs, named_runs, sync_folder, unwritable, write

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
KEYS = {"net", "optimizer", "scheduler", "rows", "record", "places"}
MOVABLE = {"workers", "data_dir", "log_dir", "teacher", "device", "threads", "pictures", "tensorboard"}  # in a resumed run
INTERVAL = 10.0  # seconds between writes, so that a GPU's short epochs don't spend their time on them
LOCK, DIVERGED = ".lock", ".diverged"
DIGEST = hashlib.sha256().digest_size


class Damaged(UserError):
    """A checkpoint that is missing, damaged, or no checkpoint."""


class Checkpoints:
    """The checkpoints in a run's folder: the newest, and the one before it. Holds the run's lock."""

    def __init__(self, folder: Path, lock: IO[bytes], places: dict[str, str], saved: int) -> None:
        """`places` are the settings of records.PLACES, `saved` the epochs in the newest checkpoint."""
        self.folder, self.lock, self.places, self.saved = folder, lock, places, saved
        self.written = time.monotonic()
        self.unwritten: dict[str, Any] | None = None

    def epoch_ended(self, state: Mapping[str, Any], log: Log, last: bool) -> None:
        """Keep a copy of `state` and `log`, and write it if the last write is INTERVAL ago or this is the last epoch.
        Raises UserError when it can't be written."""
        # A copy, for the next epoch changes the tensors in place; off the GPU, which may be lost by the time it is needed.
        self.unwritten = _copied({**state, "rows": log.rows, "record": log.record, "places": self.places})
        if last or time.monotonic() - self.written >= INTERVAL:
            self.write()

    def write(self) -> None:
        """Write the state kept last, if it isn't written yet. Raises UserError when it can't be written; what was
        written before is then still there."""
        if self.unwritten is None:
            return
        newest, fresh = self.folder / NEWEST, self.folder / f"{TEMPORARY}{NEWEST}"
        write(fresh, pack(self.unwritten), durable=True)
        try:
            # A crash between the two renames leaves the previous checkpoint only, and resuming finds it.
            if newest.exists():
                os.replace(newest, self.folder / PREVIOUS)
            os.replace(fresh, newest)
            sync_folder(self.folder)
        except OSError as error:
            raise unwritable(newest, error) from error
        self.saved, self.unwritten, self.written = len(self.unwritten["rows"]), None, time.monotonic()

    def rescue(self, end: BaseException) -> None:
        """The run is ending by `end`: write what isn't written, and note on `end` what is safe and how to go on."""
        with suppress(Exception):  # a full disk, say, of which `end` tells already
            self.write()
        safe = f"epochs 0 to {self.saved - 1} are safe" if self.saved else "no epoch is finished yet"
        if isinstance(end, Diverged):
            with suppress(OSError):
                (self.folder / DIVERGED).touch()
            end.add_note(f"{safe} in {self.folder}, but to resume it would only repeat this")
        else:
            usual = Path(Config.log_dir, "runs").resolve() == self.folder.parent.resolve()
            run = self.folder.name if usual else shlex.quote(str(self.folder))
            end.add_note(f"{safe}; go on with: python main.py --resume {run}")


def _copied(value: Any) -> Any:
    """`value` with copies, on the CPU, of the tensors in its dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def pack(state: Mapping[str, Any]) -> bytes:
    """`state` as a file that torch.load also reads, with its SHA-256 behind it."""
    buffer = io.BytesIO()
    torch.save(_copied(state), buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def unpack(path: Path) -> dict[str, Any]:
    """The state in the file `path`, its tensors on the CPU. Raises Damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} can't be read ({error.strerror})") from error
    content, digest = data[:-DIGEST], data[-DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise Damaged(f"{path.name} is damaged (its checksum is wrong)")
    try:  # a right checksum is no proof of good will, so only tensors and plain values are loaded
        with warnings.catch_warnings(action="ignore"):  # of foreign content, about which the error says enough
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on foreign content
        raise Damaged(f"{path.name} holds no checkpoint that is safe to load") from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise Damaged(f"{path.name} is no checkpoint of this program")
    return state


def load(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The newest whole state in a run's folder, and a note that names a damaged newest one. Raises UserError where
    neither the newest nor the previous checkpoint is whole."""
    try:
        return unpack(folder / NEWEST), []
    except Damaged as newest:
        try:
            return unpack(folder / PREVIOUS), [f"{newest}: went on from {PREVIOUS}"]
        except Damaged as previous:
            raise UserError(f"run {folder.name} can't be resumed: {newest}, and {previous}; start it anew") from previous


@dataclass
class Resumed:
    """An unfinished run that is taken up again: its folder, config, and the state of its last checkpoint."""

    folder: Path
    config: Config
    state: dict[str, Any]
    notes: list[str]
    lock: IO[bytes]

    def continued(self, record: dict[str, Any]) -> dict[str, Any]:
        """`record`, which is of now, with the notes of the run so far and on what has changed since. Raises UserError
        where the images or the teacher are not the same."""
        before = self.state["record"]
        if record["dataset"]["sha256"] != before["dataset"]["sha256"]:
            raise UserError(f"the images in {self.config.data_dir} are not those that run {self.folder.name} began with: "
                            "name the right folder with --data-dir")
        if record["config"]["teacher"] != before["config"].get("teacher", ""):
            raise UserError(f"teacher {self.config.teacher} is not the one that run {self.folder.name} began with: name "
                            "that one with --teacher")
        now, then = ({"threads": each["config"]["threads"], "batches": each["config"].get("batches", "workers"),
                      "model.py": each["network"]["model_sha256"][:8], **each["machine"], **each["versions"]}
                     for each in (record, before))
        changes = [f"{key} {then.get(key)} -> {now.get(key)}" for key in now if now[key] != then.get(key)]
        notes = [*before["notes"], *self.notes]
        if changes:
            notes.append(f"resumed at epoch {len(self.state['rows'])} with changes, so the bits may differ from a run "
                         f"that was not interrupted: {'; '.join(changes)}")
        return record | {"notes": notes}

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Whatever in here finds that the state doesn't fit raises UserError."""
        try:
            yield
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"run {self.folder.name} does not fit the network of model.py, or this version of the program: "
                            "undo the edits made since, or start a new run") from error


def take_up(name: str, given: Mapping[str, Any]) -> Resumed:
    """The unfinished run `name`, or if it is "" the newest that didn't diverge, locked. `given` are the settings of the command
    line: those that are not MOVABLE must be the run's own. Raises UserError."""
    log_dir = Path(given.get("log_dir", Config.log_dir))
    found = named_runs(log_dir, name) if name else [
        run for run in find_runs(log_dir) if resumable(run) and not (run / DIVERGED).exists()]
    if not found:
        raise UserError(f"there is no unfinished run in {log_dir / 'runs'}: start one without --resume")
    folder = next(filter(resumable, found), found[0])
    if (folder / SUMMARY).exists():
        raise UserError(f"run {folder.name} is finished: there is nothing to resume")
    if not resumable(folder):
        raise UserError(f"{folder} holds no checkpoint: it is no run that could be resumed")
    held = lock(folder)
    state, notes = load(folder)
    config = config_of(state["record"], state["places"], folder)
    for setting, value in given.items():
        if setting not in MOVABLE and value != getattr(config, setting):
            raise UserError(f"{setting} is {value} on the command line, but run {folder.name} has "
                            f"{getattr(config, setting)}: leave --{setting.replace('_', '-')} out, or start a new run")
    moved = {setting: value for setting, value in given.items() if setting in MOVABLE}
    if "log_dir" not in given and folder.parent.name == "runs":
        moved["log_dir"] = str(folder.parent.parent)  # the copies of the logs belong above the run
    config = dataclasses.replace(config, **moved)
    _tidy(folder, damaged=bool(notes))
    return Resumed(folder, config, state, notes, held)


def config_of(record: dict[str, Any], here: dict[str, Any], folder: Path) -> Config:
    """The settings of the run in `folder`, from its config.json, and those of `here` and now: at least those of records.PLACES.
    Raises UserError where they are none of this program's."""
    try:
        earlier = {"batches": "workers"}  # before there was this setting, workers made them all
        return Config(**(earlier | record["config"] | here))
    except (TypeError, KeyError, UserError) as error:
        raise UserError(f"run {folder.name} was made by another version of this program ({error}): "
                        "use it with that one, or start it anew") from error


def _tidy(folder: Path, damaged: bool) -> None:
    """Remove what a crash left half written, and put a damaged newest checkpoint where it can't displace the previous."""
    try:
        for left in folder.glob(f"{TEMPORARY}*"):
            left.unlink()
        if damaged and (folder / NEWEST).exists():
            os.replace(folder / NEWEST, folder / "checkpoint.damaged.pt")
    except OSError as error:
        raise unwritable(folder, error) from error


def resumable(folder: Path) -> bool:
    """Whether the folder is that of an unfinished run."""
    return not (folder / SUMMARY).exists() and any((folder / name).exists() for name in (NEWEST, PREVIOUS))


def lock(folder: Path) -> IO[bytes]:
    """Mark a run as running for as long as the returned file is open and this process lives. Raises UserError when it
    is running already. The lock is the process's own: workers that outlive a killed parent don't hold it."""
    try:
        file = open(folder / LOCK, "ab")  # noqa: SIM115 (open for the whole run)
    except OSError as error:
        raise unwritable(folder / LOCK, error) from error
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(f"run {folder.name} is still running: wait for it, or stop it first") from error
    return file
