"""Finished runs made up for the tests of comparing them."""

import copy
import math
import re
from pathlib import Path

from conftest import REFERENCE

from tinycnn.experiments.comparison import SettingGroup, Table, make_tables, read_finished
from tinycnn.experiments.differences import COMMITTED_NETWORK
from tinycnn.runs.files import make_run_folder
from tinycnn.runs.finding import find_runs, next_number
from tinycnn.runs.log import ACCURACY_LOG, FORMATS, table
from tinycnn.runs.record import CONFIG, SUMMARY, as_json, read_run, summarize

NOISE = (0.1, -0.2, 0.1)


def make_finished(log_dir: Path, accuracy: float, seed: int = 0, *, network: dict | None = None, dataset: dict | None = None,
                  edits: dict | None = None, files: dict | None = None, validation: int = 0, epochs: int = 80, name: str = "",
                  stem: str = "2026-01-01_00-00-00", **changes) -> Path:
    """Make the folder of a finished run in log_dir/runs, like the reference but for what is given. A key of `network` that is
    "absent" is left out. `edits`: the hashes of edited files; without them, the run is older than that. `files`: copies in the
    folder."""
    reference = read_run(REFERENCE)
    record = copy.deepcopy(reference.record)
    record["number"] = next_number(log_dir)
    record["config"] |= changes | {"name": name, "seed": seed, "validation": validation, "epochs": epochs}
    if edits is None:
        record["network"]["identity"] = COMMITTED_NETWORK["identity"]
        record.pop("sources", None)
    else:
        record["network"].pop("identity", None)
        record["sources"] = {"version": 1, "edited": edits}
    record["network"] = {key: value for key, value in (record["network"] | (network or {})).items() if value != "absent"}
    record["dataset"] |= (dataset or {}) | ({"sha256": "held out", "validation": validation} if validation else {})
    rows = [dict(row) for row in reference.rows[:epochs]]
    rows[-1] |= {"test_acc": accuracy}
    if validation:
        for row in rows:
            row |= {"val_loss": 0.5, "val_acc": accuracy + 1}
            row["test_loss"] = row["test_acc"] = math.nan
        rows[-1] |= {"test_loss": 0.5, "test_acc": accuracy}
    columns = [column for column in FORMATS if validation or not column.startswith("val_")]
    return make_run_folder(log_dir, stem + (f"-{name}" if name else ""), {
        CONFIG: as_json(record), ACCURACY_LOG: "# run\n" + table(rows, columns), SUMMARY: as_json(summarize(rows)),
        **(files or {})})


def compared(log_dir: Path) -> list[Table]:
    return make_tables(read_finished(find_runs(log_dir))[0], read_run(REFERENCE))


def group_of(table: Table, **differs: str) -> SettingGroup:
    """The group with these differences from the reference, and no others; _ for a space or a hyphen."""
    [group] = [group for group in table.groups
               if {re.sub("[ -]", "_", name): value for name, value in group.differs.items()} == differs]
    return group
