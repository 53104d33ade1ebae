"""Write what a run leaves on disk while it trains: log, checkpoints, weights, summary."""

import contextlib
import copy
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from config import Config, UserError
from tinycnn.runs.checkpoint import State, copy_state, make_state, pack, write_checkpoint
from tinycnn.runs.files import NoFileLocks, make_run_folder, remove_run_leftovers, write
from tinycnn.runs.finding import CHECKPOINT, DIVERGED, PROGRAM, RunState, run_state
from tinycnn.runs.jobs import mark_job
from tinycnn.runs.log import AccuracyLog, Row, comments
from tinycnn.runs.record import BEST, CONFIG, FINAL, MODEL, SUMMARY, Record, as_json, summarize
from tinycnn.runs.resuming import Unfinished, lock_run
from tinycnn.runs.weights import Weights, save_weights
from tinycnn.training.errors import Diverged

INTERVAL = 10.0  # seconds between checkpoints, so that a GPU's short epochs don't spend their time on them
DATE = "%Y-%m-%d_%H-%M-%S"  # the name of a run's folder; its --name follows
MODEL_SOURCE = (PROGRAM / MODEL).read_bytes()  # now: a user may edit it while runs of a sweep are made


class RunWriter:
    """Writes the files of one run and holds its lock. As a context manager, it saves what can be saved when the run ends early,
    and notes on the exception what is safe and how to resume."""

    def __init__(self, folder: Path, lock: IO[bytes], record: Record, places: Mapping[str, str], net: nn.Module,
                 optimizer: torch.optim.Optimizer, state: State) -> None:
        """`state` is that of the newest checkpoint; see start_run and resume_run."""
        self.folder, self.lock, self.record, self.places = folder, lock, record, places
        self.net, self.optimizer = net, optimizer
        self.rows: list[Row] = state["rows"]
        self.best: dict[str, Any] | None = state.get("best")  # epoch and weights of the highest validation accuracy
        self.log = AccuracyLog(folder, Path(places["log_dir"]), record, self.rows)
        self.saved_epochs, self.saved_at = len(self.rows), time.monotonic()
        self.unsaved: State | None = None

    def start_log(self, network_summary: str) -> None:
        """Write config.json and the logs, and print the log's comments and header."""
        write(self.folder / CONFIG, as_json(self.record))
        mark_job(self.folder)
        self.log.start(network_summary)
        self._write_best()  # a crash may have come between a checkpoint and this
        print("\n".join(self.log.comments), end="\n\n", flush=True)
        print(self.log.header(), flush=True)

    def add_notes(self, *notes: str) -> None:
        """Add lines to the comments of the log, and to config.json."""
        self.record["notes"] += notes
        self.log.comments = comments(self.folder.name, self.record)
        write(self.folder / CONFIG, as_json(self.record))

    def save_epoch(self, row: Row, last: bool) -> str:
        """Add an epoch to the log; write a checkpoint if the last one is INTERVAL ago, or after the last epoch. Returns the
        log's row."""
        if "val_acc" in row and all(row["val_acc"] > earlier["val_acc"] for earlier in self.rows):
            self.best = {"epoch": row["epoch"], "net": copy.deepcopy(self.net.state_dict())}
        self.rows.append(row)
        self.unsaved = copy_state(make_state(self.net, self.optimizer, self.rows, self.record, self.places))
        if self.best:
            self.unsaved["best"] = self.best
        if last or time.monotonic() - self.saved_at >= INTERVAL:
            self._write_checkpoint()
        self.log.update()
        return self.log.last_row()

    def finish(self) -> None:
        """Write the final weights, and last the summary, which marks the run as finished."""
        save_weights(self.folder / FINAL, self.net.state_dict(), self._metadata())
        self.log.update(durable=True)
        write(self.folder / SUMMARY, as_json(summarize(self.rows)), durable=True)

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and run_state(self.folder) is not RunState.FINISHED:
            self._rescue(error)

    def _rescue(self, error: BaseException) -> None:
        """Write what isn't written yet, and note on `error` what is safe and how to resume."""
        if not self.folder.is_dir():
            error.add_note("nothing of the run is left; start a new run")
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
            del self.rows[self.saved_epochs:]
            self.log.update()

    def _write_checkpoint(self) -> None:
        if self.unsaved is None:
            return
        write_checkpoint(self.folder, self.unsaved)
        self.saved_epochs, self.unsaved, self.saved_at = len(self.unsaved["rows"]), None, time.monotonic()
        self._write_best()

    def _write_best(self) -> None:
        """Write the best weights, which the newest checkpoint holds too: so they always belong to an epoch that is kept."""
        if self.best:
            save_weights(self.folder / BEST, self.best["net"], self._metadata())

    def _metadata(self) -> dict[str, Any]:
        """What is needed to use the weights. The number of workers, which changes nothing, is left out."""
        dataset = self.record["dataset"]
        return {"class_names": dataset["class_names"], "mean": dataset["mean"], "standard_deviation": dataset["deviation"],
                "images": dataset["sha256"], "network": self.record["network"]["identity"],
                "config": {key: value for key, value in self.record["config"].items() if key != "workers"}}


class NoWriter(RunWriter):
    """Writes nothing: for processes that leave the files to the first one."""

    def __init__(self) -> None:
        self.folder, self.rows = Path(), []

    def start_log(self, network_summary: str) -> None:
        """Do nothing."""

    def add_notes(self, *notes: str) -> None:
        """Do nothing."""

    def save_epoch(self, row: Row, last: bool) -> str:
        """Do nothing. Returns an empty line."""
        return ""

    def finish(self) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        pass


def local_places(config: Config, teachers: Sequence[Weights]) -> dict[str, str]:
    """The log folder, and absolute paths of the images and the teachers, so that a run can be resumed from another working
    folder, and keeps its teachers when newer runs have their names."""
    paths = [os.path.abspath(teacher.path) for teacher in teachers]
    usable = all(os.path.exists(path) and "," not in path for path in paths)  # a cluster's machine may have no file of them
    return {"data_dir": os.path.abspath(config.data_dir), "log_dir": config.log_dir,
            "teacher": ",".join(paths) if usable else config.teacher}


def start_run(config: Config, record: Record, net: nn.Module, optimizer: torch.optim.Optimizer,
              teachers: Sequence[Weights] = ()) -> RunWriter:
    """Make the folder of a new run, with a checkpoint of its beginning, so that it can be resumed from then on."""
    remove_run_leftovers(Path(config.log_dir))
    places = local_places(config, teachers)
    state = make_state(net, optimizer, [], record, places)
    stem = time.strftime(DATE) + (f"-{config.name}" if config.name else "")
    folder = make_run_folder(Path(config.log_dir), stem, {
        CONFIG: as_json(record), MODEL: MODEL_SOURCE, CHECKPOINT: pack(state)})
    try:
        lock = lock_run(folder)
    except NoFileLocks:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return RunWriter(folder, lock, record, places, net, optimizer, state)


def resume_run(unfinished: Unfinished, config: Config, record: Record, net: nn.Module,
               optimizer: torch.optim.Optimizer, teachers: Sequence[Weights] = ()) -> RunWriter:
    """Load the state of an unfinished run into `net` and `optimizer`, and go on with its files. Raises UserError where the
    state doesn't fit them."""
    record, state = unfinished.continue_record(record), unfinished.state
    try:
        net.load_state_dict(state["net"])
        _load_optimizer_state(optimizer, state["optimizer"]["state"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"run {unfinished.folder.name} does not fit the network of model.py, or this version of the program: "
                        "undo the edits made since, or start a new run") from error
    return RunWriter(unfinished.folder, unfinished.lock, record, local_places(config, teachers), net, optimizer, state)


def _load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Load what the optimizer has learned, such as momentum. Its settings are those it was just made with."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loaded: dict[int, dict[str, Any]] = {index: dict(values) for index, values in state.items()}
    for index, values in loaded.items():
        for name, value in values.items():
            alike = value is not None and name != "step" and value.shape == parameters[index].shape
            if value is not None and name == "momentum_buffer" and not alike:
                raise ValueError(f"the momentum of parameter {index} has the shape {value.shape}")
            if alike:  # the parameter's memory format: fused optimizers want no other
                values[name] = torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
