"""Tables of a comparison as text for a terminal, and as CSV."""

import csv
import io
import math
import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinycnn.experiments.comparison import SettingGroup, Table
from tinycnn.experiments.statistics import LEVEL, POWER, pooled_std
from tinycnn.runs.finding import PROGRAM
from tinycnn.runs.record import SavedRun
from tinycnn.sources import ON_TOP, present_sources, sources_of
from tinycnn.text import plural, printable

WIDTH = 80  # characters of a line
CSV_COLUMNS = ("dataset", "run", "differs", "seeds", "count", "val_acc", "test_acc", "train_acc", "parameters", "multiply_adds",
               "receptive_field", "seconds", "compared_with", "difference", "standard_error", "p", "corrected_p", "detectable",
               "val_std", "test_std")


def as_text(tables: Sequence[Table]) -> str:
    """The tables for a terminal, WIDTH characters wide."""
    return "\n".join("\n".join([*textwrap.wrap(table.dataset, WIDTH), "", *_aligned(table), "", *_judgement(table),
                                *_edits(table), ""]) for table in tables)


def _aligned(table: Table) -> list[str]:
    """The lines of a table; a label that is too long goes on in the next line."""
    accuracies = ["val_acc", "test_acc"] if table.metric == "val_acc" else ["test_acc"]
    header = ["seeds", *(name.removesuffix("_acc") for name in accuracies), "difference", "detects", "verdict"]
    rows = [header, *(_cells(group, accuracies) for group in table.groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    room = WIDTH - sum(widths) - 2 * len(widths)
    labels = ["settings", *(with_short_teachers(group.label) for group in table.groups)]
    label_width = min(room, max(map(len, labels)))
    lines = []
    for label, row in zip(labels, rows, strict=True):
        first, *others = _wrapped(label, label_width)
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines += ["  ".join([first.ljust(label_width), *cells, row[-1]]).rstrip(), *others]
    return lines


def with_short_teachers(label: str) -> str:
    """The label with several teachers joined by " + ", where a line can break, and without the dates of runs that have a name:
    the digests tell them apart."""
    label = re.sub(r"(?<=[ ,])\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-(?!\d+[:/])(?=[^ ,]+:[0-9a-f]{8})", "", label)
    return re.sub(r"(:[0-9a-f]{8}),(?=[^ ])", r"\1 + ", label)


def _wrapped(label: str, width: int) -> list[str]:
    """The lines of a label. A setting and its value stay in one line if they fit."""
    parts = [part.replace(" ", "\u00a0") if len(part) + 2 <= width else part for part in label.split(", ")]
    return [line.replace("\u00a0", " ").rstrip() for line in textwrap.wrap(", ".join(parts), width, subsequent_indent=" ")]


def _cells(group: SettingGroup, accuracies: Sequence[str]) -> list[str]:
    judged = group.difference
    return [str(len(group.runs)), *(f"{group.mean(name):.2f}" for name in accuracies),
            "-" if judged is None else _plus_minus(judged.points, judged.error),
            "-" if judged is None or math.isnan(judged.detectable) else f"{judged.detectable:.2f}",
            "" if judged is None else judged.verdict]


def _plus_minus(points: float, error: float) -> str:
    return f"{points:+.2f}" + ("" if math.isnan(error) else f" ±{error:.2f}")


def _judgement(table: Table) -> list[str]:
    """How the differences of a table were judged, in lines."""
    judged = [group.difference for group in table.groups if group.difference]
    if not judged:
        return ["There is nothing to compare on these images yet."]
    parts = []
    if table.shared:
        parts.append(f"All differ from the reference in: {_listed(table.shared)}.")
    parts.append(f"Differences are in points of {table.judged_by} accuracy, ± standard error, from the base: the row with "
                 "as many epochs that differs least from the reference.")
    if any(group.is_reference for group in table.groups):
        parts.append("The base itself is compared with the reference.")
    known = [f"{std.value:.2f} at {plural(epochs, 'epoch')}" for epochs, std in sorted(table.stds.items())
             if std.dof and std.value]
    if known:
        parts.append(f"Standard deviation over seeds: {', '.join(known)}.")
    tested = sum(difference.verdict != "unknown" for difference in judged)
    if tested:
        parts.append(f"If no settings differ, at most {LEVEL:.0%} of tables call any difference significant. "
                     f"\"Detects\" is the smallest difference that so many seeds find in {POWER:.0%} of cases; more seeds "
                     "find smaller ones. \"Not significant\" doesn't show that there is no difference.")
    if tested < len(judged):
        parts.append("Unknown: no standard deviation can be estimated; run more seeds (sweep --seeds 3).")
    return textwrap.wrap(" ".join(parts), WIDTH)


def _edits(table: Table) -> list[str]:
    """The commands that show the edits of each row against its base, where the folders of both have a copy of the file."""
    commands = []
    for group in table.groups:
        base = group.difference.base if group.difference else group
        for name in ON_TOP:
            files = [_from_here(_copy(each.runs[0], name)) for each in (base, group)]
            edited = len({sources_of(each.runs[0].record).get(name) for each in (base, group)}) > 1
            if edited and all(map(os.path.isfile, files)):
                commands.append("  " + printable(shlex.join(["diff", *files])))
    return ["", "To see what was edited:", *commands] if commands else []


def _copy(run: SavedRun, name: str) -> Path:
    """The run's copy of a file; the program's own where the run, like the committed ones, has none and neither is edited."""
    own = run.folder / name
    as_shipped = name not in sources_of(run.record) and name not in present_sources()["edited"]
    return PROGRAM / name if as_shipped and not own.exists() else own


def _from_here(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _listed(differs: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in differs.items())


def as_csv(tables: Sequence[Table]) -> str:
    """The tables for programs: a line a group, figures unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for group in table.groups:
            network, judged = group.runs[0].record["network"], group.difference
            comparison: list[object] = [""] * 6 if judged is None else [
                judged.base.name, judged.points, judged.error, judged.p, judged.corrected_p, judged.detectable]
            writer.writerow([
                table.dataset, group.name, _listed(group.differs) or "-", _seeds(group), len(group.runs), group.mean("val_acc"),
                group.mean("test_acc"), group.mean("train_acc"), network["parameters"], network["multiply_adds"],
                network["receptive_field"], group.mean_seconds(), *comparison, _std(group, "val_acc"), _std(group, "test_acc")])
    return text.getvalue()


def _seeds(group: SettingGroup) -> str:
    seeds = group.seeds
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return " ".join(map(str, seeds))


def _std(group: SettingGroup, name: str) -> float:
    return pooled_std([group.values(name)]).value if not math.isnan(group.mean(name)) else math.nan
