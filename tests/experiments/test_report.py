"""What compare prints and writes: 80 columns, best first, the judgement in words, CSV."""

import csv
import functools
import io
import math
import re

import pytest
from conftest import REFERENCE, one_line
from made_up_runs import NOISE, compared, make_finished

from tinycnn.experiments.report import as_csv, as_text
from tinycnn.runs.finding import find_runs
from tinycnn.runs.log import ACCURACY_LOG
from tinycnn.runs.record import CONFIG, read_run


@pytest.fixture
def make(tmp_path):
    """make(accuracy, seed, lr=0.1) -> the folder of a finished run in tmp_path/runs."""
    return functools.partial(make_finished, tmp_path)


@pytest.fixture
def sweep(make):
    """Three settings of eight epochs, three seeds each; one with a long label."""
    for seed in range(3):
        make(86 + NOISE[seed], seed, epochs=8, lr=0.1)
        make(88 + NOISE[seed], seed, epochs=8, lr=0.1, nesterov=True)
        make(87 + NOISE[seed], seed, epochs=8, lr=0.1, coarse_dropout_p=0.25, label_smoothing=0.1, weight_decay=0.001)


def test_the_table_fits_80_columns_best_first(sweep, tmp_path):
    [table] = compared(tmp_path)
    text = as_text([table])
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("settings"))
    assert lines[header].split() == ["settings", "seeds", "test", "difference", "detects", "verdict"]
    assert re.fullmatch(r"reference +1 +88\.\d\d +-  +-", lines[header + 1])
    assert re.fullmatch(r"nesterov True +3 +88\.00 +\+2\.00 ±0\.14 +0\.\d\d  significant", lines[header + 2])
    assert re.fullmatch(r"coarse_dropout_p 0\.25, +3 +87\.00 +\+1\.00 ±0\.14 +0\.\d\d  significant", lines[header + 3])
    assert lines[header + 4:header + 6] == [" weight_decay 0.001,", " label_smoothing 0.1"]
    assert re.search(r"^nothing else +3 +86\.00 +-2\.\d\d +-  unknown$", text, re.MULTILINE)


def test_with_validation_it_fits_too(make, tmp_path):
    for seed in range(2):
        make(80 + NOISE[seed], seed, validation=5000, epochs=8)
        make(12 + NOISE[seed], seed, validation=5000, epochs=8, weight_decay=0.0005, label_smoothing=0.1)
    text = as_text(compared(tmp_path))
    assert "base itself" not in text  # the reference has no validation
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^label_smoothing 0\.1 +2 +12\.95 +11\.95 +-68\.00 ±0\.21 +\d\.\d\d  significant$", text, re.MULTILINE)


def test_teachers_are_told_without_the_dates_of_their_runs(make, tmp_path):
    make(88, epochs=8, teacher="2026-11-26_12-12-23-one:98bfadf7,2026-11-26_12-12-45:2215ce86", lr=0.1)
    make(87, epochs=8, teacher="2026-11-26_12-12-23-one:98bfadf7", lr=0.2)
    make(86, epochs=8, teacher="2026-11-26_12-12-23-2:98bfadf8", lr=0.3)
    text = as_text(compared(tmp_path))
    assert re.search(r"^lr 0\.1, teacher one:98bfadf7 \+ +1 +88\.00 .*\n 2026-11-26_12-12-45:2215ce86$", text, re.MULTILINE)
    assert re.search(r"^lr 0\.2, teacher one:98bfadf7 +1 +87\.00 ", text, re.MULTILINE)
    assert "2026-11-26_12-12-23-2:98bfadf8" in "".join(line.strip() for line in text.splitlines())


def test_what_all_groups_share_is_told_once(make, tmp_path):
    for changes in ({}, {"nesterov": True}, {"momentum": 0.8}):
        make(88, lr=0.05, epochs=8, **changes)
    [table] = compared(tmp_path)
    assert table.shared == {"epochs": "8", "lr": "0.05"}
    assert {group.label for group in table.groups} == {"reference", "nothing else", "nesterov True", "momentum 0.8"}
    text = " ".join(as_text([table]).split())
    assert text.count("lr 0.05") == 1
    assert "All differ from the reference in: epochs 8, lr 0.05. " in text
    assert "epochs 8, lr 0.05, nesterov True" in as_csv([table])


def test_how_it_was_judged_is_told_in_words(sweep, tmp_path, make):
    text = " ".join(as_text(compared(tmp_path)).split())
    assert "Standard deviation over seeds: 0.17 at 8 epochs." in text
    assert "at most 5% of tables call any difference significant" in text
    assert "the smallest difference that so many seeds find in 80% of cases" in text
    assert "The base itself is compared with the reference." in text
    assert "noise" not in text
    for seed in range(2):
        make(60 + NOISE[seed], seed, epochs=1)
    assert "0.21 at 1 epoch, 0.17 at 8 epochs" in " ".join(as_text(compared(tmp_path)).split())


def test_the_csv_has_the_figures_unrounded(sweep, tmp_path):
    log = next(folder for folder in find_runs(tmp_path) if '"nesterov": true' in (folder / CONFIG).read_text()) / ACCURACY_LOG
    head, last = log.read_text().rstrip().rsplit("\n", 1)
    values, seconds = last.rsplit(maxsplit=1)
    log.write_text(f"{head}\n{values} {float(seconds) + 3}\n")  # one of three runs took three seconds longer
    rows = list(csv.DictReader(io.StringIO(as_csv(compared(tmp_path)))))
    best = next(row for row in rows if row["differs"] == "epochs 8, lr 0.1, nesterov True")
    assert (best["seeds"], best["count"]) == ("0 to 2", "3")
    assert float(best["test_acc"]) == pytest.approx(88)
    assert float(best["seconds"]) == pytest.approx(math.fsum(row["seconds"] for row in read_run(REFERENCE).rows[:8]) + 1)
    assert float(best["test_std"]) == pytest.approx(3 ** 0.5 / 10)
    assert float(best["difference"]) == pytest.approx(2)
    assert float(best["standard_error"]) == pytest.approx((0.03 * 2 / 3) ** 0.5)
    assert 0 < float(best["p"]) < float(best["corrected_p"]) < 0.05
    assert 0 < float(best["detectable"]) < 2
    assert next(row for row in rows if row["run"] == "reference")["differs"] == "-"
    assert [row["test_acc"] for row in rows] == sorted((row["test_acc"] for row in rows), reverse=True)


def test_compare_writes_nothing_into_the_folder_of_a_run(command):
    status, _, err = command("compare", "--log-dir", REFERENCE)
    assert status == 2
    assert "is the folder of a run" in one_line(err)
