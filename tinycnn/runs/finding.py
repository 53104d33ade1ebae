"""Find runs by name or path, and determine their state."""

import contextlib
import json
import os
import platform
import re
from enum import Enum
from pathlib import Path
from typing import Any

from config import UserError, did_you_mean
from tinycnn.runs.record import CONFIG, FINAL, SUMMARY

PROGRAM = Path(__file__).parents[2]
REFERENCE = PROGRAM / "logs" / "reference"  # the committed run of the defaults, of seed 0
OTHER_SEEDS = sorted(REFERENCE.glob("baseline/*"))  # the same with other seeds
CHECKPOINT, PREVIOUS_CHECKPOINT = "checkpoint.pt", "checkpoint.previous.pt"
JOB = ".job"  # a file in the folder of a run that torchrun has started: the job
DIVERGED = ".diverged"  # an empty file in the folder of a run whose loss was no longer finite


class RunState(Enum):
    """The states of a run's folder."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    UNFINISHED = "unfinished"
    FOREIGN = "no run of this program"


def run_state(folder: Path) -> RunState:
    """The state of the run in `folder`."""
    if (folder / SUMMARY).exists():
        return RunState.FINISHED
    if (folder / DIVERGED).exists():
        return RunState.DIVERGED
    if any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT)):
        return RunState.UNFINISHED
    return RunState.FOREIGN


def find_runs(log_dir: Path) -> list[Path]:
    """The folders in `log_dir`/runs, newest first, by run number, so that a changed clock doesn't matter."""
    runs = log_dir / "runs"
    if not runs.is_dir():
        return []
    folders = [path for path in runs.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(folders, key=lambda folder: (_number(folder), _natural(folder.name)), reverse=True)


def next_number(log_dir: Path) -> int:
    """The number of a run that is about to be made in `log_dir`."""
    return max(map(_number, find_runs(log_dir)), default=0) + 1


def named_runs(log_dir: Path, name: str) -> list[Path]:
    """The folders of the runs that match `name`, newest first: by folder name, by --name, or by path, from here or from the
    program's folder."""
    found = [folder for folder in find_runs(log_dir) if name == folder.name
             or (name in folder.name and name == _name(folder))]
    found = found or [path for path in (Path(name), PROGRAM / name) if path.is_dir()][:1]
    if not name or not found:
        parents = [parent for parent in (Path(name).parent, PROGRAM / Path(name).parent) if parent.is_dir()]
        near = [*(folder.name for folder in find_runs(log_dir)),
                *(str(Path(name).parent / path.name) for parent in parents for path in parent.iterdir())]
        raise UserError(f"there is no run {name!r}, neither a folder or a --name in {log_dir / 'runs'} nor a path to one"
                        + did_you_mean(name, near))
    return [folder.resolve() for folder in found]


def find_finished(log_dir: Path, name: str | None) -> Path:
    """The newest finished run, or the newest finished one that matches `name`."""
    folders = find_runs(log_dir) if name is None else named_runs(log_dir, name)
    folder = next((folder for folder in folders if run_state(folder) is RunState.FINISHED and (folder / FINAL).exists()), None)
    if folder:
        return folder
    if name is None:
        raise UserError(f"there is no finished run in {log_dir / 'runs'}: train one, or name a run, such as "
                        "logs/reference, or a .safetensors file")
    state = run_state(folders[0])
    if state is RunState.FINISHED:
        raise UserError(f"run {name} has no {FINAL}: name one that has")
    if state is RunState.UNFINISHED:
        raise UserError(f"run {name} is not finished: resume it (--resume), or name another one")
    inside = sorted(path.name for path in folders[0].iterdir() if path.is_dir() and run_state(path) is RunState.FINISHED)
    if inside:
        raise UserError(f"{name} is a folder of runs: name one of them, {', '.join(inside)}")
    raise UserError(f"{name} is no finished run ({state.value}): name another one")


def find_unfinished(log_dir: Path, name: str) -> Path:
    """The newest unfinished run, or the newest unfinished one that matches `name`."""
    folders = named_runs(log_dir, name) if name else find_runs(log_dir)
    # a run that diverged is resumed only where it is named
    wanted = (RunState.UNFINISHED, RunState.DIVERGED) if name else (RunState.UNFINISHED,)
    folder = next((folder for folder in folders if run_state(folder) in wanted), None)
    if folder:
        return folder
    if not name:
        raise UserError(f"there is no unfinished run in {log_dir / 'runs'}: start one without --resume")
    if run_state(folders[0]) is RunState.FINISHED:
        raise UserError(f"run {folders[0].name} is finished: there is nothing to resume; to train on, start a new run with "
                        f"--init {folders[0].name}")
    raise UserError(f"{folders[0]} has no checkpoint, so it can't be resumed")


def refuse_run_folder(log_dir: Path) -> None:
    """Raise UserError where `log_dir` is itself the folder of a run, whose log would be overwritten."""
    if "config" in peek_record(log_dir) or run_state(log_dir) is not RunState.FOREIGN:
        raise UserError(f"--log-dir {log_dir} is the folder of a run, whose log would be overwritten: choose another folder")


def _number(folder: Path) -> int:
    number = peek_record(folder).get("number", 0)  # older runs have none
    return number if isinstance(number, int) else 0


def _name(folder: Path) -> str:
    """The --name of a run; from the folder's, where its record is damaged."""
    after_date = folder.name[len("2026-01-31_12-00-00-"):] if (folder / CONFIG).exists() else ""
    return peek_record(folder).get("config", {}).get("name", after_date)


def peek_record(folder: Path) -> dict[str, Any]:
    """config.json unchecked, {} where it can't be read: for finding, which looks into foreign folders too."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("config", {}), dict):
            return content
    return {}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def find_job_run(log_dir: Path) -> tuple[RunState, Path]:
    """The run that this job of torchrun began before its processes were restarted, and its state; FOREIGN if there is none. A
    job that begins takes its name from the runs of earlier jobs."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    for folder in find_runs(log_dir) if job_name() else ():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (folder / JOB).read_text(encoding="utf-8") == job_name():
                if restarted:
                    return run_state(folder), folder
                (folder / JOB).unlink()
    return RunState.FOREIGN, Path()


def job_name() -> str:
    """The name of torchrun's job: its own, or its process where it has none. Empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{platform.node()} {os.getppid()}" if name == "none" else name
