"""One run on disk while it trains: its folder, logs, checkpoints and weights, from its beginning or from where it was left."""

import contextlib
import copy
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from config import SETTINGS, Config, UserError, flag
from tinycnn import startup
from tinycnn.errors import Diverged
from tinycnn.network.summary import describe_network, torch_summary
from tinycnn.processes import world
from tinycnn.runs.checkpoint import State, load_states, pack, read_newest, write_checkpoint
from tinycnn.runs.files import TEMPORARY, NoFileLocks, lock_file, make_run_folder, remove_run_leftovers, unwritable, write
from tinycnn.runs.finding import (
    CHECKPOINT,
    DIVERGED,
    JOB,
    RunState,
    find_job_run,
    find_unfinished,
    job_name,
    next_number,
    run_state,
)
from tinycnn.runs.inputs import Inputs, make_record
from tinycnn.runs.log import AccuracyLog, Row, comments
from tinycnn.runs.record import BEST, CONFIG, FINAL, NAME_WEIGHTS, SUMMARY, Record, as_json, digests, present_names, summarize
from tinycnn.runs.tensorboard import Events
from tinycnn.runs.weights import describe_init, save_weights
from tinycnn.sources import COPIED_FILES, code_hash, edits_between, resumed_sources

INTERVAL = 10.0  # seconds between checkpoints, so that a GPU's short epochs don't spend their time on them
DATE = "%Y-%m-%d_%H-%M-%S"  # the name of a run's folder; its --name follows
LOCK = ".lock"
BAR = "{desc} |{bar}| {n_fmt} of {total_fmt} epochs, {remaining} left"
# settings that may differ when a run is resumed
CHANGEABLE_ON_RESUME = {"workers", "data_dir", "log_dir", *NAME_WEIGHTS, "device", "threads", "pictures", "tensorboard",
                        "instruction_set"}


class Run:
    """One run. `Run(config)` is a new one, `Run.resume(name, given)` one that was begun before; `begin` puts it in place.

    As a context manager, it saves what can be saved when the run ends early, and notes on the exception what is safe and how to
    resume. Of several processes, only the first writes anything.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path()
        self.state: State | None = None  # what the next checkpoint holds; one assignment changes all of it
        self.notes: list[str] = []

    @classmethod
    def resume(cls, name: str, given: Mapping[str, Any]) -> "Run":
        """Lock and load the newest unfinished run that matches `name`, or the newest of all if that is empty. `given` are the
        settings of the command line. Raises UserError where they are not the run's own, but for CHANGEABLE_ON_RESUME."""
        folder = find_unfinished(Path(given.get("log_dir", Config.log_dir)), name)
        lock = _lock(folder)
        state, notes = read_newest(folder)
        config = restore_config(state, folder)
        for setting, value in given.items():
            decided = setting in ("dataset", "batches") and value == "auto"  # as which the run may have been started
            if setting not in CHANGEABLE_ON_RESUME and not decided and value != getattr(config, setting):
                why, instead = "", "or start a new run"
                if setting == "epochs":
                    why = ", and the end of a schedule is fixed when a run begins"
                    instead = f"and when it is finished, train on with a new run, --init {folder.name}"
                raise UserError(f"{flag(setting)} is {value} on the command line, but run {folder.name} has "
                                f"{getattr(config, setting)}{why}: leave {flag(setting)} out, {instead}")
        changed = {setting: value for setting, value in given.items() if setting in CHANGEABLE_ON_RESUME}
        if "log_dir" not in given and folder.parent.name == "runs":
            changed["log_dir"] = str(folder.parent.parent)  # the copies of the logs belong above the run
        _tidy(folder, damaged=bool(notes))
        run = cls(replace(config, **changed))
        run.folder, run.state, run.notes, run.lock = folder, state, notes, lock
        return run

    @property
    def rows(self) -> list[Row]:
        """The log so far, an epoch a row."""
        return self.state["rows"] if self.state else []

    def begin(self, inputs: Inputs, net: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
        """Make the folder of a new run, with a checkpoint of its beginning; or load the states of an old one's last checkpoint.
        Sets `epochs_done`. Raises UserError where the old run doesn't fit what was built."""
        self.config, self.net, self.optimizer, self.scheduler = inputs.config, net, optimizer, scheduler
        startup.mark("network")
        if world.is_first:
            twin = copy.deepcopy(net).cpu()
            self.record = make_record(inputs, describe_network(twin), next_number(Path(self.config.log_dir)))
            self.local_paths = local_paths(inputs)
            if self.state is None:
                if inputs.init:
                    self.record["notes"].append(describe_init(net, inputs.init, len(inputs.dataset.class_names)))
                self._make_folder()
            else:
                self._load(self.state)
            self.log = AccuracyLog(self.folder, Path(self.config.log_dir), self.record, self.rows)
            write(self.folder / CONFIG, as_json(self.record))
            if job := job_name():
                write(self.folder / JOB, job)
            self.log.start(torch_summary(twin, str(inputs.device)))
            self._write_best()  # a crash may have come between a checkpoint and this
            print(self.log.heading(), end="\n\n", flush=True)
        self.saved_epochs = self.epochs_done = world.broadcast(lambda: len(self.rows))
        startup.mark("records")

    def _make_folder(self) -> None:
        remove_run_leftovers(Path(self.config.log_dir))
        self.state = self._snapshot([], None)
        stem = time.strftime(DATE) + (f"-{self.config.name}" if self.config.name else "")
        self.folder = make_run_folder(Path(self.config.log_dir), stem, {
            CONFIG: as_json(self.record), **COPIED_FILES, CHECKPOINT: pack(self.state)})
        try:
            self.lock = _lock(self.folder)
        except NoFileLocks:
            for path in (*self.folder.iterdir(), self.folder):
                path.rmdir() if path.is_dir() else path.unlink()
            raise

    def _load(self, state: State) -> None:
        """Load a checkpoint, and go on with its record."""
        self.record = _continued(self.record, state, self.folder, self.config, self.notes)
        try:
            load_states(state, self.net, self.optimizer, self.scheduler)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"run {self.folder.name} does not fit the network, the optimizer or the scheduler of this program: "
                            "undo the edits made since, or start a new run") from error

    def __enter__(self) -> "Run":
        self.saved_at = self.epoch_began = time.monotonic()
        if world.is_first:
            print(self.log.header(), flush=True)
            self.events = Events(self.config.tensorboard, self.folder, self.rows)
            self.bar = tqdm(total=self.config.epochs, initial=len(self.rows), desc="run", leave=False, dynamic_ncols=True,
                            bar_format=BAR, disable=None if self.config.epochs > 1 else True)
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if not world.is_first:
            return
        self.bar.close()
        if error is not None and run_state(self.folder) is not RunState.FINISHED:
            self._rescue(error)
        with contextlib.suppress(OSError):  # a full disk, of which writing the last row has told
            self.events.close()
        self.lock.release()

    def note(self, line: str) -> None:
        """Add a line to the comments of the log, and to config.json."""
        if world.is_first:
            self.record["notes"].append(line)
            self.log.comments = comments(self.folder.name, self.record)
            write(self.folder / CONFIG, as_json(self.record))

    def log_epoch(self, row: Row) -> None:
        """Add an epoch to the log, and print it. Writes a checkpoint if the last one is INTERVAL ago, or after the last epoch.
        A key that the log doesn't know becomes a column."""
        if not world.is_first:
            return
        row = {"_".join(name.split()): value if name == "epoch" else float(value) for name, value in row.items()}
        row["seconds"] = time.monotonic() - self.epoch_began
        best = self.state["best"] if self.state and "best" in self.state else None
        if "val_acc" in row and all(row["val_acc"] > earlier["val_acc"] for earlier in self.rows):
            best = {"epoch": row["epoch"], "net": copy.deepcopy(self.net.state_dict())}
        self.state = self._snapshot([*self.rows, row], best)
        if line := startup.line():
            self.note(line)
        if row["epoch"] == self.config.epochs - 1 or time.monotonic() - self.saved_at >= INTERVAL:
            self._write_checkpoint()
        header, self.log.rows = self.log.header(), self.rows
        self.log.update()
        self.events.write(row)
        with self.bar.external_write_mode():  # above the bars
            if self.log.header() != header:  # a new column
                print(self.log.header())
            print(self.log.last_row(), flush=True)
        self.bar.update()
        self.epoch_began = time.monotonic()

    def finish(self) -> None:
        """Write the final weights, and last the summary, which marks the run as finished."""
        if world.is_first:
            save_weights(self.folder / FINAL, self.net.state_dict(), self._metadata())
            self.log.update(durable=True)
            write(self.folder / SUMMARY, as_json(summarize(self.rows)), durable=True)

    def _snapshot(self, rows: list[Row], best: dict[str, Any] | None) -> State:
        """The content of a checkpoint. Tensors are copied, so that later steps don't change it."""
        state = {name: copy.deepcopy(getattr(self, name).state_dict()) for name in ("net", "optimizer", "scheduler")}
        return state | {"rows": rows, "record": self.record, "places": self.local_paths} | ({"best": best} if best else {})

    def _write_checkpoint(self) -> None:
        if self.state and len(self.rows) > self.saved_epochs:
            write_checkpoint(self.folder, self.state)
            self.saved_epochs, self.saved_at = len(self.rows), time.monotonic()
            self._write_best()

    def _write_best(self) -> None:
        """Write the best weights, which the newest checkpoint holds too: so they always belong to an epoch that is kept."""
        if self.state and "best" in self.state:
            save_weights(self.folder / BEST, self.state["best"]["net"], self._metadata())

    def _metadata(self) -> dict[str, Any]:
        """What is needed to use the weights. The number of workers, which changes nothing, is left out."""
        dataset = self.record["dataset"]
        return {"class_names": dataset["class_names"], "mean": dataset["mean"], "standard_deviation": dataset["deviation"],
                "images": dataset["sha256"], "model": code_hash(COPIED_FILES["model.py"]),
                "config": {key: value for key, value in self.record["config"].items() if key != "workers"}}

    def _rescue(self, error: BaseException) -> None:
        """Write what isn't written yet, and note on `error` what is safe and how to resume."""
        if not self.folder.is_dir():
            error.add_note("the run's folder was deleted; start a new run")
            return
        with contextlib.suppress(Exception):  # a full disk, say, of which `error` tells already
            self._write_checkpoint()
        last = self.saved_epochs - 1
        safe = f"epochs 0 to {last} are safe" if last > 0 else "epoch 0 is safe" if last == 0 else "no epoch is finished yet"
        if isinstance(error, Diverged):
            with contextlib.suppress(OSError):
                (self.folder / DIVERGED).touch()
            error.add_note(f"{safe} in {self.folder}, but resuming would diverge again")
        else:
            usual = Path(Config.log_dir, "runs").resolve() == self.folder.parent.resolve()
            name = self.folder.name if usual else shlex.quote(str(self.folder))
            error.add_note(f"{safe}; resume with: python main.py --resume {'./' if name.startswith('-') else ''}{name}")
        with contextlib.suppress(Exception):  # the log must not be ahead of the checkpoint
            self.log.rows = self.rows[:self.saved_epochs]
            self.log.update()


def choose_run(config: Config | None, given: Mapping[str, Any], name: str | None) -> Run | None:
    """The run to train: the one that this job began before torchrun restarted it, the one called `name`, or a new one of
    `config`. None where this job has finished it. `given` are the settings of the command line."""
    state, folder = find_job_run(Path(given.get("log_dir", Config.log_dir)))
    if state is RunState.DIVERGED:
        raise Diverged(f"run {folder.name} has diverged: to start it again would only repeat this")
    if state is RunState.FINISHED:
        return None
    if state is RunState.UNFINISHED:
        name, given = str(folder), {setting: value for setting, value in given.items() if setting in CHANGEABLE_ON_RESUME}
    if name is not None:
        return Run.resume(name, given)
    assert config is not None
    return Run(config)


def _lock(folder: Path) -> FileLock:
    """Mark the run as running until the lock is released, or this process ends."""
    lock = lock_file(folder / LOCK)
    if lock is None:
        raise UserError(f"run {folder.name} is still running: wait for it, or stop it first")
    return lock


def is_running(folder: Path) -> bool:
    """Whether another process trains the run in `folder`."""
    lock = lock_file(folder / LOCK)
    if lock is not None:
        lock.release()
    return lock is None


def _tidy(folder: Path, damaged: bool) -> None:
    """Remove what a crash left half written, and put a damaged newest checkpoint where it can't displace the previous."""
    try:
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink()
        if damaged and (folder / CHECKPOINT).exists():
            os.replace(folder / CHECKPOINT, folder / "checkpoint.damaged.pt")
    except OSError as error:
        raise unwritable(folder, error) from error


def local_paths(inputs: Inputs) -> dict[str, str]:
    """The log folder, and absolute paths of the images and the teachers, so that a run can be resumed from another working
    folder, and keeps its teachers when newer runs have their names. A resumed run has no use for an init."""
    config, paths = inputs.config, [os.path.abspath(teacher.path) for teacher in inputs.teachers]
    usable = all(os.path.exists(path) and "," not in path for path in paths)  # a cluster's machine may have no file of them
    return {"data_dir": os.path.abspath(config.data_dir), "log_dir": config.log_dir,
            "init": "", "teacher": ",".join(paths) if usable else config.teacher}


def restore_config(state: State, folder: Path) -> Config:
    """The config of the run in `folder`, from the settings in its records and its paths on this machine."""
    # before there was that setting, workers made them all
    known = {"batches": "workers"} | present_names(state["record"]["config"]) | state["places"]
    try:
        if unknown := known.keys() - SETTINGS.keys():
            raise UserError(f"with the settings {', '.join(sorted(map(str, unknown)))}")
        return Config(**known)
    except UserError as error:
        raise UserError(f"run {folder.name} was made by another version of this program ({error}): resume it with that one, or "
                        "start a new run") from error


def _continued(record: Record, state: State, folder: Path, config: Config, notes: list[str]) -> Record:
    """`record`, made by this process, with the number of the run in `folder`, its notes, and a note on what has changed since.
    Raises UserError where the images, the init or the teacher are not the same."""
    before, epoch = state["record"], len(state["rows"])
    if record["dataset"]["sha256"] != before["dataset"]["sha256"]:
        raise UserError(f"the images in {config.data_dir} are not those that run {folder.name} "
                        "began with: name the right folder with --data-dir")
    init, kept = record["config"]["init"], {name: before["config"].get(name, "") for name in NAME_WEIGHTS}
    if init and digests(init) != digests(kept["init"]):
        raise UserError(f"--init {config.init} is not what run {folder.name} began with: leave --init out")
    if digests(record["config"]["teacher"]) != digests(kept["teacher"]):
        raise UserError(f"--teacher {config.teacher} is not the one that run {folder.name} began with: name that one")
    notes = [*before["notes"], *notes]
    now, then = ({"threads": each["config"]["threads"], "batches": each["config"].get("batches", "workers"),
                  "processes": 1, **each["machine"], **each["versions"]} for each in (record, before))
    changes = [f"{key} {value} -> {now[key]}" for key, value in then.items()
               if key in now and not _same_version(str(now[key]), str(value))]
    changes += [f"{file} edited" for file in edits_between(folder, before)]
    if changes:
        notes.append(f"resumed at epoch {epoch} with changes, so the bits may differ from a run that was not interrupted: "
                     f"{'; '.join(changes)}")
    return record | {"config": record["config"] | {"init": kept["init"]}, "notes": notes, "number": before.get("number", 0),
                     "sources": resumed_sources(before, epoch),
                     **({"procedure": before["procedure"]} if "procedure" in before else {})}


def _same_version(one: str, other: str) -> bool:
    """Whether two are equal, or one only says more: 2.14.1 and 2.14.1+cu130, which older records hold."""
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}+"))
