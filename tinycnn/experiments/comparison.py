"""Compare runs: groups that differ in their seed only, a table for each dataset, and which differences are significant."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config import UserError
from tinycnn.experiments.differences import alike, differences, hashes
from tinycnn.experiments.statistics import (
    LEVEL,
    Estimate,
    detectable_difference,
    error_of_difference,
    holm,
    pooled_std,
    t_test,
)
from tinycnn.runs.finding import RunState, run_state
from tinycnn.runs.record import SavedRun, read_run
from tinycnn.text import printable

JUDGED_BY = {"val_acc": "validation", "test_acc": "test"}


@dataclass(frozen=True)
class Difference:
    """The difference between two groups' mean accuracies, in percentage points. nan stands for what one seed can't estimate."""

    base: "SettingGroup"  # the other group
    points: float
    error: float  # standard error
    p: float  # of the t-test
    corrected_p: float  # for all comparisons of the table
    detectable: float  # the smallest difference that so many seeds detect

    @property
    def verdict(self) -> str:
        """significant, not significant, or unknown."""
        if math.isnan(self.corrected_p):
            return "unknown"
        return "significant" if self.corrected_p <= LEVEL else "not significant"


@dataclass
class SettingGroup:
    """Runs that differ in their seed only, newest first, one a seed."""

    runs: list[SavedRun]
    differs: dict[str, str]  # from the reference
    is_reference: bool = False
    label: str = ""  # `differs`, without what all groups of the table share
    standard_error: float = math.nan  # of the mean of the metric, in points
    difference: Difference | None = None

    @property
    def metric(self) -> str:
        """The accuracy that settings are chosen by."""
        return metric_of(self.runs[0].record["config"]["validation"])

    @property
    def epochs(self) -> int:
        return self.runs[0].record["config"]["epochs"]

    @property
    def name(self) -> str:
        """The folder's name of the newest run."""
        return printable(self.runs[0].folder.name)

    @property
    def seeds(self) -> list[int]:
        return sorted(run.record["config"]["seed"] for run in self.runs)

    def values(self, name: str) -> list[float]:
        """A figure of the last epoch, one a seed; nan where a run has none."""
        return [run.rows[-1].get(name, math.nan) for run in self.runs]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))

    def mean_seconds(self) -> float:
        """The seconds of all epochs of a run."""
        return statistics.fmean(math.fsum(row["seconds"] for row in run.rows) for run in self.runs)


@dataclass(frozen=True)
class Table:
    """The groups on one dataset, the best first. `stds` are the standard deviations over seeds, in points, by epochs."""

    dataset: str
    groups: list[SettingGroup]
    shared: dict[str, str]  # what all groups but the reference have in common that differs from it
    stds: dict[int, Estimate] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return self.groups[0].metric

    @property
    def judged_by(self) -> str:
        """The images whose accuracy is compared."""
        return JUDGED_BY[self.metric]


def read_finished(folders: Iterable[Path]) -> tuple[list[SavedRun], list[str]]:
    """The finished runs in `folders`, and a line for each other folder, on what it is."""
    runs, left_out = [], []
    for folder in folders:
        name, state = printable(folder.name), run_state(folder)
        if state is not RunState.FINISHED:
            left_out.append(f"{name}: {state.value}")
            continue
        try:
            run = read_run(folder)
            _check(run)
            runs.append(run)
        except UserError as error:
            left_out.append(f"{name}: {printable(str(error))}")
    return runs, left_out


def metric_of(validation: int) -> str:
    """The accuracy that settings are chosen by: that on the `validation` images, or on the test images if there are none."""
    return "val_acc" if validation else "test_acc"


def _check(run: SavedRun) -> None:
    """Raise UserError unless the run's files agree with each other."""
    config = run.record["config"]
    if len(run.rows) != config["epochs"] or not all(math.isfinite(run.rows[-1].get(name, math.nan))
                                                    for name in (metric_of(config["validation"]), "test_acc", "train_acc")):
        raise UserError(f"its log is not that of a finished run of {config['epochs']} epochs")


def make_tables(runs: Sequence[SavedRun], reference: SavedRun, *other_seeds: SavedRun) -> list[Table]:
    """The groups of the runs and the reference, with its `other_seeds`: a table a dataset, that of the reference first. `runs`
    are the newest first.

    Only runs on the same images are compared: a table's runs have equal numbers of training images, too.
    """
    committed = {run.folder.resolve(): run for run in (reference, *other_seeds)}
    by_dataset: dict[str, list[SavedRun]] = {reference.record["dataset"]["sha256"]: []}
    for run in (*(run for run in runs if run.folder.resolve() not in committed), *committed.values()):
        by_dataset.setdefault(run.record["dataset"]["sha256"], []).append(run)
    return [_make_table(members, reference) for members in by_dataset.values()]


def _make_table(runs: Sequence[SavedRun], reference: SavedRun) -> Table:
    groups = _make_groups(runs, reference)
    stds = compare_groups(groups)
    shared = _shared([group.differs for group in groups if not group.is_reference])
    for group in groups:
        own = {name: value for name, value in group.differs.items() if name not in shared}
        nothing = "reference" if group.is_reference else "nothing else" if group.differs else "as the reference"
        group.label = ", ".join(f"{name} {value}" for name, value in own.items()) or nothing
    groups.sort(key=lambda group: -group.mean(group.metric))
    dataset = runs[0].record["dataset"]
    return Table(f"{printable(dataset['kind'])}, {dataset['train']:,} training, {dataset['validation']:,} validation and "
                 f"{dataset['test']:,} test images", groups, shared, stds)


def _make_groups(runs: Sequence[SavedRun], reference: SavedRun) -> list[SettingGroup]:
    """Groups in the order of their newest runs. Of runs with the same seed, the newest counts."""
    groups: list[SettingGroup] = []
    # Runs of before, with an identity, make the groups: the network's figures in others may fit several
    for run in sorted(runs, key=lambda run: "identity" not in run.record["network"]):
        group = next((group for group in groups if alike(run.record, group.runs[0].record)), None)
        if group is None:
            group = SettingGroup([], differences(run.record, reference.record))
            groups.append(group)
        group.runs.append(run)
        group.is_reference |= run is reference
    order = {id(run): place for place, run in enumerate(runs)}
    for group in groups:
        oldest_first = sorted(group.runs, key=lambda run: -order[id(run)])
        newest = {run.record["config"]["seed"]: run for run in oldest_first}
        group.runs = sorted(newest.values(), key=lambda run: order[id(run)])
    for group in [group for group in groups if sum(group.differs == other.differs for other in groups) > 1]:
        if not group.is_reference:  # the same files were edited, each time otherwise
            group.differs = group.differs | hashes(group.runs[0].record)
    return sorted(groups, key=lambda group: order[id(group.runs[0])])


def _shared(differing: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What two or more groups, and all of them, have in common."""
    if len(differing) < 2:
        return {}
    return {name: value for name, value in differing[0].items() if all(other.get(name) == value for other in differing)}


def compare_groups(groups: Sequence[SettingGroup]) -> dict[int, Estimate]:
    """Give each group its standard error and its difference, with p values corrected for their number. `groups` are in the
    order of their newest runs. Returns the standard deviation over seeds by epochs.

    A group is compared with the one of as many epochs that differs least from the reference, and that one with the reference.
    The standard deviation is pooled over the groups of as many epochs, and no others: longer runs vary less.
    """
    stds = {epochs: pooled_std(group.values(group.metric) for group in groups if group.epochs == epochs)
            for epochs in {group.epochs for group in groups}}
    pairs = [(group, base) for group in groups if (base := _base(group, groups))]
    errors = [error_of_difference(stds[group.epochs], len(group.runs), stds[base.epochs], len(base.runs))
              for group, base in pairs]
    points = [group.mean(group.metric) - base.mean(base.metric) for group, base in pairs]
    p_values = [t_test(difference, error) for difference, error in zip(points, errors, strict=True)]
    tested = sum(not math.isnan(p) for p in p_values)
    for (group, base), error, difference, p, corrected in zip(pairs, errors, points, p_values, holm(p_values), strict=True):
        detectable = math.nan if math.isnan(p) else detectable_difference(error, tested)
        group.difference = Difference(base, difference, error.value, p, corrected, detectable)
    for group in groups:
        group.standard_error = stds[group.epochs].value / math.sqrt(len(group.runs))
    return stds


def _base(group: SettingGroup, groups: Sequence[SettingGroup]) -> SettingGroup | None:
    """The group to compare `group` with."""
    same_length = [other for other in groups if other.epochs == group.epochs]
    base = min(reversed(same_length), key=lambda other: len(other.differs))  # the oldest, where several differ as little
    if base is not group:
        return base
    return next((other for other in groups if other.is_reference and other is not group), None)
