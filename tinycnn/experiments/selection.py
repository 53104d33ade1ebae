"""Choose the runs to compare, and write down how they compare."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from tinycnn.experiments.comparison import Table, make_tables, read_finished
from tinycnn.experiments.report import as_csv, as_text
from tinycnn.runs.drawing import drawing, save
from tinycnn.runs.files import write
from tinycnn.runs.finding import OTHER_SEEDS, PROGRAM, REFERENCE, find_runs, named_runs, refuse_run_folder
from tinycnn.runs.record import SavedRun, read_run


def compare_runs(log_dir: Path, names: Sequence[str] = ()) -> None:
    """Print the tables of the runs that `names` name, or of all runs; write experiments.csv and experiments.png."""
    refuse_run_folder(log_dir)
    runs, left_out = read_finished(_folders(log_dir, names))
    if names and not runs:
        raise UserError(f"there is nothing to compare: {left_out[0]}; name finished runs")
    tables = make_tables(runs, *_reference())
    for line in left_out:
        print(f"left out: {line}")
    print(as_text(tables))
    write(log_dir / "experiments.csv", as_csv(tables))
    with drawing("experiments.png"):
        from tinycnn.experiments.plots import experiments  # loads Matplotlib

        save(experiments(_newest(tables, runs)), log_dir / "experiments.png")


def _reference() -> list[SavedRun]:
    """The reference run, and those with other seeds."""
    try:
        return [read_run(folder) for folder in (REFERENCE, *OTHER_SEEDS)]
    except UserError as error:
        raise UserError(f"the reference run can't be read ({error}): restore it with git -C {shlex.quote(str(PROGRAM))} "
                        "checkout -- logs/reference, or undo edits of config.py that don't fit it") from error


def _folders(log_dir: Path, names: Sequence[str]) -> list[Path]:
    """The folders of the runs that are named, or of all runs; the newest first."""
    if not log_dir.is_dir():
        raise UserError(f"there is no folder {log_dir}: name the one that holds the runs with --log-dir")
    ordered = [folder.resolve() for folder in find_runs(log_dir)]
    if not names:
        return ordered
    named = dict.fromkeys(folder.resolve() for name in names for folder in named_runs(log_dir, name))
    return [folder for folder in ordered if folder in named] + [folder for folder in named if folder not in ordered]


def _newest(tables: Sequence[Table], runs: Sequence[SavedRun]) -> Table:
    """The table with the newest run that is compared with others."""
    age = {run.folder: place for place, run in enumerate(runs)}
    compared = [table for table in tables if len(table.groups) > 1]
    return min(compared or tables, key=lambda table: min(age.get(run.folder, len(age)) for group in table.groups
                                                         for run in group.runs))
