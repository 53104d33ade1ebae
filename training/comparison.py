"""Runs side by side: what differs, what came out, and whether that is more than noise."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtr

from config import UserError
from training.differences import NETWORK, differences
from training.records import Run, find_runs, named_runs, read_run, write

LEVEL = 0.05


def compare(log_dir: str, names: Sequence[str], reference: Path) -> None:
    """Print the tables of the finished runs in `log_dir`, all or those named, beside the `reference` run; write them to
    experiments.md and experiments.csv there, and draw the one with the newest run. Raises UserError for a name that is no
    run's, and where none of those named is finished."""
    logs = Path(log_dir)
    if not logs.is_dir():
        raise UserError(f"there is no folder {logs}: name the one that holds the runs with --log-dir")
    folders = [folder for name in names for folder in named_runs(logs, name)] or find_runs(logs)
    runs, skipped = finished(dict.fromkeys(folders))
    if names and not runs:
        raise UserError(f"there is nothing to compare: {skipped[0]}; name finished runs")
    found = tables(runs, read_run(reference))
    for line in skipped:
        print(f"left out: {line}")
    print(as_text(found))
    for name, text in (("experiments.md", as_markdown(found)), ("experiments.csv", as_csv(found))):
        write(logs / name, text)
    from training.plots import experiments  # matplotlib loads here

    experiments(max(found, key=lambda table: table.rows[0].name() if len(table.rows) > 1 else ""), logs / "experiments.png")


@dataclass(frozen=True)
class Difference:
    """Of a row's accuracy from that of the row it is compared with, in points: with its standard error, and the p value of
    the two-sided t-test before and after Holm's correction; the last three are nan where no row has two seeds."""

    to: str
    points: float
    error: float
    p: float
    corrected_p: float

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{self.points:+.2f}, noise unknown"
        return f"{self.points:+.2f} ± {self.error:.2f}, {'more than noise' if self.corrected_p <= LEVEL else 'noise'}"


@dataclass
class Row:
    """Runs that differ in their seed only, newest first, one a seed."""

    runs: list[Run]
    differs: dict[str, str]  # from the reference
    difference: Difference | None = None

    @property
    def metric(self) -> str:
        """The accuracy that settings are chosen by: that on the validation images where there are some."""
        return "val_acc" if "val_acc" in self.runs[0].rows[-1] else "test_acc"

    @property
    def epochs(self) -> int:
        return self.runs[0].record["config"]["epochs"]

    def values(self, name: str) -> list[float]:
        """A figure of the last epoch of each run; nan where a run has none."""
        return [run.rows[-1].get(name, math.nan) for run in self.runs]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))

    def seconds(self) -> float:
        """Of a run's epochs, the mean over the runs."""
        return statistics.fmean(math.fsum(each["seconds"] for each in run.rows) for run in self.runs)

    def name(self) -> str:
        return self.runs[0].folder.name

    def seeds(self) -> str:
        seeds = sorted(run.record["config"]["seed"] for run in self.runs)
        if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
            return f"{seeds[0]} to {seeds[-1]}"
        return " ".join(map(str, seeds))

    def change(self, shared: Mapping[str, str] | None = None) -> str:
        """What differs from the reference, beyond what is `shared`."""
        beyond = self.differs.items() - (shared or {}).items()
        nothing = "nothing else" if self.differs else "-"
        return ", ".join(f"{key} {value}" for key, value in self.differs.items() if (key, value) in beyond) or nothing


@dataclass(frozen=True)
class Table:
    """The runs on one dataset. `spread` is the standard deviation over seeds, in points, pooled over all rows that have more
    than one, with its degrees of freedom; nan and 0 where there is none."""

    dataset: str
    rows: list[Row]
    spread: float
    freedom: int

    @property
    def shared(self) -> dict[str, str]:
        """What two or more rows, and all of them, have in common that differs from the reference."""
        differing = [row.differs.items() for row in self.rows if row.differs]
        common = set.intersection(*map(set, differing)) if len(differing) > 1 else set()
        return {key: value for key, value in (differing[0] if common else ()) if (key, value) in common}

    @property
    def judged_by(self) -> str:
        """The images whose accuracy is compared."""
        return {"val_acc": "validation", "test_acc": "test"}[self.rows[0].metric]


def finished(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in these folders, and a line for each other one, on what it is."""
    runs, skipped = [], []
    for folder in folders:
        try:
            run = read_run(folder)
            if run.summary is None:
                skipped.append(f"{folder.name} is not finished")
                continue
            _check(run)
            runs.append(run)
        except UserError as error:
            skipped.append(f"{folder.name} is no whole run: {error}")
    return runs, skipped


def _check(run: Run) -> None:
    """Raise UserError unless the run's config.json has what a comparison reads."""
    try:
        complete = (bool(run.rows) and {"train_acc", "test_acc", "seconds"} <= run.rows[-1].keys()
                    and isinstance(run.record["config"]["seed"], int) and isinstance(run.record["config"]["epochs"], int)
                    and {*NETWORK, "model_sha256"} <= run.record["network"].keys()
                    and {"kind", "sha256", "train", "test", "validation"} <= run.record["dataset"].keys())
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError("its config.json is not this program's")


def tables(runs: Sequence[Run], reference: Run) -> list[Table]:
    """The runs and the reference in rows, a table a dataset; that of the reference first, rows newest first.

    Each row is compared with the row of its dataset and its number of epochs that differs least from the reference, and
    that one with the reference, where the reference is on the same dataset.
    """
    by_dataset: dict[str, list[Run]] = {reference.record["dataset"]["sha256"]: []}
    for run in sorted(runs, key=lambda run: run.folder.name, reverse=True):
        if run.folder.resolve() != reference.folder.resolve():
            by_dataset.setdefault(run.record["dataset"]["sha256"], []).append(run)
    by_dataset[reference.record["dataset"]["sha256"]].append(reference)
    return [_table(members, reference) for members in by_dataset.values()]


def _table(runs: Sequence[Run], reference: Run) -> Table:
    rows: dict[tuple, Row] = {}
    for run in runs:
        differs = differences(run, reference)
        row = rows.setdefault(tuple(differs.items()), Row([], differs))
        if run.record["config"]["seed"] not in [other.record["config"]["seed"] for other in row.runs]:
            row.runs.append(run)
    table = list(rows.values())
    repeated = [row.values(row.metric) for row in table if len(row.runs) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in repeated)
    spread = math.sqrt(squares / freedom) if freedom else math.nan
    _compare(table, spread, freedom)
    about = runs[0].record["dataset"]
    return Table(f"{about['kind']}, {about['train']:,} training, {about['validation']:,} validation and {about['test']:,} "
                 "test images", table, spread, freedom)


def _compare(rows: Sequence[Row], spread: float, freedom: int) -> None:
    """Give every row its difference, with p values corrected for their number."""
    pairs = []
    for row in rows:
        same_length = [other for other in rows if other.epochs == row.epochs]
        base = min(reversed(same_length), key=lambda other: len(other.differs))
        if base is row:
            base = next((other for other in rows if not other.differs), row)
        if base is not row:
            pairs.append((row, base))
    tested = []
    for row, base in pairs:
        points = row.mean(row.metric) - base.mean(base.metric)
        error = spread * math.sqrt(1 / len(row.runs) + 1 / len(base.runs))
        p = math.nan if math.isnan(error) else 2 * float(stdtr(freedom, -abs(points) / error)) if error else float(points == 0)
        tested.append((p, row, Difference(base.name(), points, error, p, math.nan)))
    at_least = 0.0
    for rank, (p, row, difference) in enumerate(sorted(tested, key=lambda each: each[0])):
        at_least = max(at_least, min(1.0, (len(tested) - rank) * p))
        row.difference = dataclasses.replace(difference, corrected_p=math.nan if math.isnan(p) else at_least)


# ---------------------------------------------------------------- written down

COLUMNS = ("run", "differs from the reference", "seeds", "validation %", "test %", "train - test", "seconds", "difference")


def cells(row: Row, shared: Mapping[str, str]) -> list[str]:
    """A row as COLUMNS has it."""
    gap = statistics.fmean(train - test for train, test in zip(row.values("train_acc"), row.values("test_acc"), strict=True))
    return [row.name(), row.change(shared), row.seeds(),
            _accuracy(row.values("val_acc")), _accuracy(row.values("test_acc")), f"{gap:+.2f}",
            f"{row.seconds():,.0f}", str(row.difference or "-")]


def _accuracy(values: Sequence[float]) -> str:
    if math.isnan(values[0]):
        return "-"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else "")


def method(table: Table) -> str:
    """How the differences of a table were judged."""
    count = sum(row.difference is not None for row in table.rows)
    if not count:
        return "There is nothing to compare on this dataset yet."
    text = ""
    if table.shared:
        text = f"All differ from the reference in: {', '.join(f'{key} {value}' for key, value in table.shared.items())}. "
    text += (f"Differences are in points of {table.judged_by} accuracy, each to the row with as many epochs that differs least "
            "from the reference, and of that one to the reference. ")
    if not table.freedom:
        return text + "No row has more than one seed, so the noise is unknown: run more seeds (sweep --seeds 3)."
    return text + ("± behind an accuracy is the standard deviation over seeds; behind a difference its standard error, from "
                   f"the spread pooled over the rows with more than one seed, {table.spread:.2f} points with {table.freedom} "
                   f"degrees of freedom. More than noise: two-sided t-test, Holm's correction for {count} comparisons, level "
                   f"{100 * LEVEL:.0f} % for all together.")


def as_text(found: Sequence[Table]) -> str:
    """For a terminal: aligned columns."""
    parts = []
    for table in found:
        lines = [list(COLUMNS), *(cells(row, table.shared) for row in table.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        parts += [table.dataset, "", *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                                       for line in lines), "", method(table), ""]
    return "\n".join(parts)


def as_markdown(found: Sequence[Table]) -> str:
    """For logs/experiments.md."""
    lines = ["# Experiments", ""]
    for table in found:
        rows = [cells(row, table.shared) for row in table.rows]
        lines += [f"## {table.dataset}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|",
                  *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
                  "", method(table), ""]
    return "\n".join(lines)


def as_csv(found: Sequence[Table]) -> str:
    """For logs/experiments.csv: a line a row, figures unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "run", "differs", "seeds", "count", "val_acc", "test_acc", "train_acc", "parameters",
                     "multiply_adds", "receptive_field", "seconds", "compared_with", "difference", "standard_error", "p",
                     "corrected_p"])
    for table in found:
        for row in table.rows:
            network, judged = row.runs[0].record["network"], row.difference
            writer.writerow([
                table.dataset, row.name(), row.change(), row.seeds(),
                len(row.runs), row.mean("val_acc"), row.mean("test_acc"), row.mean("train_acc"), network["parameters"],
                network["multiply_adds"], network["receptive_field"], row.seconds(),
                *((judged.to, judged.points, judged.error, judged.p, judged.corrected_p) if judged else [""] * 5)])
    return text.getvalue()
