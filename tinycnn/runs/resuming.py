"""Load an unfinished run, and check that it resumes with the same settings, images, network and training procedure."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from config import SETTINGS, Config, UserError, flag
from tinycnn.runs.checkpoint import State, read_newest
from tinycnn.runs.files import TEMPORARY, lock_file, unwritable
from tinycnn.runs.finding import CHECKPOINT, find_unfinished
from tinycnn.runs.record import CONFIG, MODEL, Record, teacher_digests
from tinycnn.training.procedure import FILES, describe_procedure

LOCK = ".lock"
# settings that may differ when a run is resumed
MOVABLE = {"workers", "data_dir", "log_dir", "teacher", "device", "threads", "pictures", "tensorboard", "instruction_set"}


@dataclass(frozen=True)
class Unfinished:
    """An unfinished run, locked: its folder, config, the state of its last checkpoint, and notes for its log."""

    folder: Path
    config: Config
    state: State
    notes: list[str]
    lock: IO[bytes]

    def continue_record(self, record: Record) -> Record:
        """`record`, made by this process, with the number of the run, its notes, and a note on what has changed since. Raises
        UserError where the images, the network or the teacher are not the same."""
        before, name = self.state["record"], self.folder.name
        if record["dataset"]["sha256"] != before["dataset"]["sha256"]:
            raise UserError(f"the images in {self.config.data_dir} are not those that run {name} began with: "
                            "name the right folder with --data-dir")
        if teacher_digests(record["config"]["teacher"]) != teacher_digests(before["config"].get("teacher", "")):
            raise UserError(f"teacher {self.config.teacher} is not the one that run {name} began with: name "
                            "that one with --teacher")
        network = before["network"]
        if network.get("identity", record["network"]["identity"]) != record["network"]["identity"]:
            raise UserError(f"run {name} began with another network than model.py has now: put {self.folder / MODEL} in its "
                            "place, or start a new run")
        now, then = ({"threads": each["config"]["threads"], "batches": each["config"].get("batches", "workers"),
                      "processes": 1, **each["machine"], **each["versions"]} for each in (record, before))
        changes = [f"{key} {value} -> {now.get(key)}" for key, value in then.items()
                   if not _same_version(str(now.get(key)), str(value))]
        notes = [*before["notes"], *self.notes]
        if changes:
            notes.append(f"resumed at epoch {len(self.state['rows'])} with changes, so the bits may differ from a run "
                         f"that was not interrupted: {'; '.join(changes)}")
        return record | {"notes": notes, "number": before.get("number", 0)}


def load_unfinished(name: str, given: Mapping[str, Any]) -> Unfinished:
    """Lock and load the newest unfinished run that matches `name`, or the newest of all if that is empty.

    `given` are the settings of the command line. Those that are not MOVABLE must be the run's own.
    """
    folder = find_unfinished(Path(given.get("log_dir", Config.log_dir)), name)
    lock = lock_run(folder)
    state, notes = read_newest(folder)
    check_procedure(folder, state["record"])
    config = restore_config(state["record"]["config"], state["places"], folder)
    for setting, value in given.items():
        resolved = setting in ("dataset", "batches") and value == "auto"  # as which the run may have been started
        if setting not in MOVABLE and not resolved and value != getattr(config, setting):
            raise UserError(f"{flag(setting)} is {value} on the command line, but run {folder.name} has "
                            f"{getattr(config, setting)}: leave {flag(setting)} out, or start a new run")
    changed = {setting: value for setting, value in given.items() if setting in MOVABLE}
    if "log_dir" not in given and folder.parent.name == "runs":
        changed["log_dir"] = str(folder.parent.parent)  # the copies of the logs belong above the run
    _tidy(folder, damaged=bool(notes))
    return Unfinished(folder, replace(config, **changed), state, notes, lock)


def check_procedure(folder: Path, record: Record) -> None:
    """Raise UserError where the program trains otherwise than it did when `record`, of the run in `folder`, was made."""
    for name, now in describe_procedure().items():
        if record.get("procedure", {}).get(name, now) != now:
            raise UserError(f"run {folder.name} began with another {name}: undo the edits made since in "
                            f"{', '.join(FILES[name])}, or install the package versions that its {CONFIG} names, or start a "
                            "new run")


def restore_config(settings: Mapping[str, Any], places: Mapping[str, str], folder: Path) -> Config:
    """The config of the run in `folder`, from the settings in its records and its places on this machine."""
    known = {"batches": "workers"} | dict(settings) | dict(places)  # before there was that setting, workers made them all
    if isinstance(known.get("capture"), bool):  # so it was written before there was `auto`
        known["capture"] = "on" if known["capture"] else "off"
    unknown = known.keys() - SETTINGS.keys()
    if unknown:
        raise UserError(f"run {folder.name} was made by another version of this program, with the settings "
                        f"{', '.join(sorted(unknown))}: resume it with that one, or start a new run")
    try:
        return Config(**known)
    except UserError as error:
        raise UserError(f"run {folder.name} was made by another version of this program ({error}): "
                        "resume it with that one, or start a new run") from error


def lock_run(folder: Path) -> IO[bytes]:
    """Mark the run as running for as long as the returned file is open and this process lives."""
    lock = lock_file(folder / LOCK)
    if lock is None:
        raise UserError(f"run {folder.name} is still running: wait for it, or stop it first")
    return lock


def _same_version(one: str, other: str) -> bool:
    """Whether two are equal, or one only says more: 2.14.1 and 2.14.1+cu130, which older records hold."""
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}+"))


def _tidy(folder: Path, damaged: bool) -> None:
    """Remove what a crash left half written, and put a damaged newest checkpoint where it can't displace the previous."""
    try:
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink()
        if damaged and (folder / CHECKPOINT).exists():
            os.replace(folder / CHECKPOINT, folder / "checkpoint.damaged.pt")
    except OSError as error:
        raise unwritable(folder, error) from error
