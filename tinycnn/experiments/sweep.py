"""The runs of a sweep: plan them, find those already made, train the others."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from config import Config, UserError, net_settings
from model import Net
from tinycnn.data.dataset import Images
from tinycnn.data.loading import load_images, resolve_dataset
from tinycnn.experiments.claims import claim
from tinycnn.experiments.differences import effective_settings, procedure_of, same_network
from tinycnn.network.identity import describe_network
from tinycnn.runs.files import lock_file
from tinycnn.runs.finding import RunState, find_runs, refuse_run_folder, run_state
from tinycnn.runs.record import Record, read_record
from tinycnn.runs.resuming import LOCK, MOVABLE, load_unfinished
from tinycnn.runs.weights import find_teachers
from tinycnn.training.errors import Diverged
from tinycnn.training.procedure import describe_procedure

Train = Callable[..., Path]  # main.train


class Outcome(Enum):
    """What became of a run of a sweep."""

    TRAINED = "trained"
    PRESENT = "finished before"
    DIVERGED = "diverged"
    ELSEWHERE = "under way elsewhere"
    FAILED = "failed"  # on a cluster, where it stops no other


@dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep asks for. Picklable."""

    config: Config  # as the command line gives it
    description: str  # what varies within the sweep
    settings: dict[str, Any]  # those that tell runs apart, as config.json will have them
    fingerprint: str  # of the images
    network: dict[str, Any]  # as config.json will have it
    procedure: dict[str, str]  # likewise

    @property
    def key(self) -> str:
        """A hash that is equal for planned runs that are the same run."""
        content = json.dumps([self.settings, self.config.seed, self.fingerprint, self.network["identity"], self.procedure],
                             sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def matches(self, record: Record) -> bool:
        """Whether `record` is that of this run."""
        return (record["config"]["seed"] == self.config.seed and record["dataset"]["sha256"] == self.fingerprint
                and effective_settings(record["config"]) == self.settings and same_network(record["network"], self.network)
                and procedure_of(record) == self.procedure)


def plan_runs(configs: Sequence[Config]) -> tuple[list[PlannedRun], Images]:
    """The runs that `configs` describe, each once, in their order, and the images that they share, which the first config
    names."""
    refuse_run_folder(Path(configs[0].log_dir))
    teachers = {}
    for config in configs:  # before any image is downloaded
        if config.teacher not in teachers:
            teachers[config.teacher] = ",".join(teacher.name for teacher in find_teachers(config))
    images = load_images(configs[0].dataset, configs[0].data_dir)
    fingerprints = {count: images.hold_out(count).fingerprint for count in {config.validation for config in configs}}
    describe = cache(lambda *size: describe_network(Net(len(images.class_names), **dict(size))))
    procedure = describe_procedure()
    varied = [name for name in vars(configs[0]) if name != "seed" and len({getattr(config, name) for config in configs}) > 1]
    plan = [PlannedRun(
        config, "".join(f"{name} {getattr(config, name)}, " for name in varied) + f"seed {config.seed}",
        effective_settings(vars(replace(resolve_dataset(config, images), teacher=teachers[config.teacher]))),
        fingerprints[config.validation], describe(*net_settings(vars(config)).items()), procedure) for config in configs]
    distinct = list({planned.key: planned for planned in plan}.values())
    if len(distinct) < len(plan):
        print(f"{len(plan) - len(distinct)} of the {len(plan)} combinations change only what has no effect beside the others: "
              "left out")
    return distinct, images


def find_matching_run(planned: PlannedRun) -> tuple[RunState, Path] | None:
    """The run that was made before: the newest finished one, or else the newest that diverged, or that can be resumed."""
    found: dict[RunState, Path] = {}
    for folder in find_runs(Path(planned.config.log_dir)):
        state = run_state(folder)
        if state in found or state is RunState.FOREIGN:
            continue
        try:
            if planned.matches(read_record(folder)):
                found[state] = folder
        except UserError:  # damaged; compare names it
            continue
    return next(((state, found[state]) for state in (RunState.FINISHED, RunState.DIVERGED, RunState.UNFINISHED)
                 if state in found), None)


def make_run(planned: PlannedRun, train: Train) -> Outcome:
    """Train the run, or resume it, unless it was made before or another process is making it."""
    with claim(Path(planned.config.log_dir), planned.key) as is_ours:
        if not is_ours:
            print("under way in another sweep: skipped")
            return Outcome.ELSEWHERE
        return make_claimed_run(planned, train)


def make_claimed_run(planned: PlannedRun, train: Train) -> Outcome:
    """Train the run, which this process has claimed, or resume it, unless it was made before. Raises UserError where this
    process would train otherwise than planned."""
    config = planned.config
    different = [name for name, found in describe_procedure().items() if found != planned.procedure.get(name)]
    if different:  # on a cluster
        raise UserError(f"the {different[0]} of this process is not that of the sweep, because of edits or of other package "
                        "versions: start the cluster and the sweep again, with the same files and packages")
    state, folder = find_matching_run(planned) or (RunState.FOREIGN, Path())
    if state is RunState.FINISHED:
        print(f"already finished: {folder.name}")
        return Outcome.PRESENT
    if state is RunState.DIVERGED:
        print(f"diverged: {folder.name}")
        return Outcome.DIVERGED
    if state is RunState.UNFINISHED and _is_running(folder):
        print(f"under way in another process: skipped ({folder.name})")
        return Outcome.ELSEWHERE
    try:
        if state is RunState.UNFINISHED:
            unfinished = load_unfinished(str(folder), {name: getattr(config, name) for name in MOVABLE})
            train(unfinished.config, unfinished)
        else:
            train(config)
    except Diverged as error:
        print(f"diverged: {error}")
        return Outcome.DIVERGED
    return Outcome.TRAINED


def _is_running(folder: Path) -> bool:
    """Whether another process trains this run."""
    lock = lock_file(folder / LOCK)
    if lock is not None:
        lock.close()
    return lock is None


def make_runs_here(plan: Sequence[PlannedRun], train: Train) -> list[Outcome]:
    """Make the runs of the plan in this process, one after another. Returns what became of each."""
    outcomes = []
    for number, planned in enumerate(plan, 1):
        print(f"\nRun {number} of {len(plan)}: {planned.description}", flush=True)
        try:
            outcomes.append(make_run(planned, train))
        except BaseException as error:
            error.add_note("or repeat the sweep, which skips what is finished")
            raise
    return outcomes
