"""The runs of a sweep: plan them, find those already made, train the others."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from config import Config, UserError, net_settings
from model import Net
from tinycnn.data.dataset import Dataset
from tinycnn.data.loading import load_dataset, resolve_auto
from tinycnn.errors import Diverged
from tinycnn.experiments.claims import claim
from tinycnn.experiments.differences import FIGURES, alike, effective_settings
from tinycnn.network.summary import describe_network
from tinycnn.runs.finding import RunState, find_runs, refuse_run_folder, run_state
from tinycnn.runs.record import Record, read_record
from tinycnn.runs.run import CHANGEABLE_ON_RESUME, Run, is_running
from tinycnn.runs.weights import load_weights, recorded_names
from tinycnn.sources import present_sources, sources_of
from tinycnn.training.machine import check_network

TrainRun = Callable[[Config, Run | None], object]  # train a new run of this config, or this one to its end


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
    record: Record  # what tells runs apart, as config.json will have it: config, network, sources, dataset

    @property
    def key(self) -> str:
        """A hash that is equal for planned runs that are the same run."""
        content = json.dumps([effective_settings(self.record["config"]), self.config.seed, self.record["dataset"]["sha256"],
                              [self.record["network"][name] for name in FIGURES], sources_of(self.record)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def matches(self, record: Record) -> bool:
        """Whether `record` is that of this run."""
        return (record["config"]["seed"] == self.config.seed
                and record["dataset"]["sha256"] == self.record["dataset"]["sha256"] and alike(record, self.record))


def plan_runs(configs: Sequence[Config]) -> tuple[list[PlannedRun], Dataset]:
    """The runs that `configs` describe, each once, in their order, and the images that they share, which the first config
    names."""
    refuse_run_folder(Path(configs[0].log_dir))
    # Before any image is downloaded
    names = {key: recorded_names(load_weights(config))
             for key, config in {(config.init, config.teacher): config for config in configs}.items()}
    dataset = load_dataset(configs[0].dataset, configs[0].data_dir)
    fingerprints = {count: dataset.hold_out(count).fingerprint for count in {config.validation for config in configs}}

    @cache
    def describe(*settings: tuple[str, Any]) -> dict[str, Any]:
        net = Net(len(dataset.class_names), **dict(settings))
        check_network(net, len(dataset.class_names))
        return describe_network(net)

    varied = [name for name in vars(configs[0]) if name != "seed" and len({getattr(config, name) for config in configs}) > 1]
    plan = [PlannedRun(
        config, "".join(f"{name} {getattr(config, name)}, " for name in varied) + f"seed {config.seed}",
        {"config": vars(resolve_auto(config, dataset)) | names[config.init, config.teacher],
         "network": describe(*net_settings(vars(config)).items()), "sources": present_sources(),
         "dataset": {"sha256": fingerprints[config.validation]}}) for config in configs]
    distinct = list({planned.key: planned for planned in plan}.values())
    if len(distinct) < len(plan):
        print(f"left out {len(plan) - len(distinct)} of {len(plan)} combinations: they differ from others only in settings "
              "without effect")
    return distinct, dataset


def find_matching_run(planned: PlannedRun) -> tuple[RunState, Path]:
    """The run that was made before: the newest finished one, or else the newest that diverged, or that can be resumed; else
    FOREIGN."""
    found: dict[RunState, Path] = {}
    for folder in find_runs(Path(planned.config.log_dir)):
        with suppress(UserError):  # damaged; compare names it
            if (state := run_state(folder)) not in (*found, RunState.FOREIGN) and planned.matches(read_record(folder)):
                found[state] = folder
    return next(((state, found[state]) for state in (RunState.FINISHED, RunState.DIVERGED, RunState.UNFINISHED)
                 if state in found), (RunState.FOREIGN, Path()))


def make_run(planned: PlannedRun, train: TrainRun) -> Outcome:
    """Train the run, or resume it, unless it was made before or another process is making it."""
    with claim(Path(planned.config.log_dir), planned.key) as is_ours:
        if not is_ours:
            print("under way in another sweep: skipped")
            return Outcome.ELSEWHERE
        return make_claimed_run(planned, train)


def make_claimed_run(planned: PlannedRun, train: TrainRun) -> Outcome:
    """Train the run, which this process has claimed, or resume it, unless it was made before. Raises UserError where this
    process would train otherwise than planned."""
    here, there = sources_of({"sources": present_sources()}), sources_of(planned.record)
    if different := sorted(name for name in here | there if here.get(name) != there.get(name)):  # on a cluster
        raise UserError(f"{', '.join(different)} of this process is not that of the sweep: start the cluster and the sweep "
                        "again, with the same files")
    state, folder = find_matching_run(planned)
    if state is RunState.FINISHED:
        print(f"already finished: {folder.name}")
        return Outcome.PRESENT
    if state is RunState.DIVERGED:
        print(f"diverged: {folder.name}")
        return Outcome.DIVERGED
    if state is RunState.UNFINISHED and is_running(folder):
        print(f"under way in another process: skipped ({folder.name})")
        return Outcome.ELSEWHERE
    try:
        if state is RunState.UNFINISHED:
            run = Run.resume(str(folder), {name: getattr(planned.config, name) for name in CHANGEABLE_ON_RESUME})
            train(run.config, run)
        else:
            train(planned.config, None)
    except Diverged as error:
        print(f"diverged: {error}")
        return Outcome.DIVERGED
    except Exception as error:
        if find_matching_run(planned)[0] is not RunState.FINISHED:
            raise
        print(f"the run is finished, but what came after it failed: {type(error).__name__}: {error}")  # a picture, say
    return Outcome.TRAINED


def make_runs_here(plan: Sequence[PlannedRun], train: TrainRun) -> list[Outcome]:
    """Make the runs of the plan in this process, one after another. Returns what became of each."""
    outcomes: dict[int, Outcome] = {}
    try:
        for number, planned in enumerate(plan, 1):
            print(f"\nRun {number} of {len(plan)}: {planned.description}", flush=True)
            outcomes[number] = make_run(planned, train)
        for number, planned in enumerate(plan, 1):  # by now it may have ended there
            if outcomes[number] is Outcome.ELSEWHERE:
                print(f"\nRun {number} of {len(plan)} again: {planned.description}", flush=True)
                outcomes[number] = make_run(planned, train)
    except BaseException as error:
        error.add_note("or repeat the sweep, which skips what is finished")
        raise
    return list(outcomes.values())


def print_outcomes(plan: Sequence[PlannedRun], outcomes: Sequence[Outcome]) -> None:
    """Print how many runs were made, and name those that diverged or are under way elsewhere."""
    print(f"\n{sum(outcome in (Outcome.TRAINED, Outcome.PRESENT) for outcome in outcomes)} of {len(plan)} runs are finished")
    advice = {Outcome.DIVERGED: "", Outcome.FAILED: "; repeat the sweep, which skips what is finished",
              Outcome.ELSEWHERE: "; repeat the sweep when they have ended"}
    for outcome, hint in advice.items():
        runs = [planned.description for planned, its_outcome in zip(plan, outcomes, strict=True) if its_outcome is outcome]
        if runs:
            print(f"{len(runs)} {outcome.value} ({'; '.join(runs)}){hint}")
    print()
