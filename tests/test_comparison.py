"""python main.py compare, on runs made up for it: rows, differences, statistics, and what is left out."""

import copy
import csv
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, one_line
from scipy import stats

import main
from training import records
from training.comparison import as_markdown, as_text, finished, method, tables
from training.records import read_run

REFERENCE = ROOT / "logs" / "reference"
NOISE = (0.1, -0.2, 0.1)


@pytest.fixture
def make(tmp_path):
    """make(accuracy, seed, lr=0.1): the folder of a finished run in tmp_path/runs, like the reference but for what is said."""
    def make(accuracy: float, seed: int = 0, *, network: dict | None = None, dataset: dict | None = None, validation: int = 0,
             epochs: int = 80, name: str = "", **changes) -> Path:
        run = read_run(REFERENCE)
        record = copy.deepcopy(run.record)
        record["config"] |= changes | {"name": name, "seed": seed, "validation": validation, "epochs": epochs}
        record["network"] |= network or {}
        record["dataset"] |= (dataset or {}) | ({"sha256": "held out", "validation": validation} if validation else {})
        rows = [dict(row) for row in run.rows[:epochs]]
        rows[-1] |= {"test_acc": accuracy}
        if validation:
            for row in rows:
                row |= {"val_loss": 0.5, "val_acc": accuracy + 1}
                row["test_loss"] = row["test_acc"] = math.nan
            rows[-1] |= {"test_loss": 0.5, "test_acc": accuracy}
        folder = records.new_folder(tmp_path, name, {records.CONFIG: records.as_json(record)})
        columns = [column for column in records.FORMATS if validation or not column.startswith("val_")]
        records.write(folder / records.ACCURACY_LOG, "# run\n" + records.table(rows, columns))
        records.write(folder / records.SUMMARY, records.as_json(records.summarize(rows)))
        return folder

    return make


def compared(log_dir: Path) -> list:
    return tables(finished(records.find_runs(log_dir))[0], read_run(REFERENCE))


def row_of(table, change: str):
    [row] = [row for row in table.rows if row.change() == change]
    return row


def test_runs_that_differ_in_their_seed_are_one_row(make, tmp_path):
    for seed in range(3):
        make(88 + NOISE[seed], seed, lr=0.05)
        make(86 + NOISE[seed], seed + 1, name=f"again{seed}", workers=4, device="cpu", threads=1)
    [table] = compared(tmp_path)
    faster, same = row_of(table, "lr 0.05"), row_of(table, "-")
    assert [len(row.runs) for row in (faster, same)] == [3, 4]  # the reference is the fourth of its row
    assert faster.mean("test_acc") == pytest.approx(88)
    assert "88.00 ± 0.17 (3)" in as_text([table])
    assert faster.seeds() == "0 to 2"


def test_a_repeated_seed_counts_once_and_the_newest(make, tmp_path):
    make(80, 5, lr=0.05)
    make(90, 5, lr=0.05, name="z")
    [table] = compared(tmp_path)
    assert row_of(table, "lr 0.05").values("test_acc") == [90]


def test_only_what_differs_is_shown_and_an_edited_network_too(make, tmp_path):
    make(85, nesterov=True, network={"parameters": 200_000, "multiply_adds": 8_000_000, "receptive_field": None,
                                     "model_sha256": "0123456789"})
    [table] = compared(tmp_path)
    assert row_of(table, "nesterov True, parameters 200,000, multiply-adds 8,000,000, receptive field ?, model.py 01234567")


def test_what_all_rows_share_is_told_once(make, tmp_path):
    for changes in ({}, {"nesterov": True}, {"momentum": 0.8}):
        make(88, lr=0.05, epochs=8, **changes)
    [table] = compared(tmp_path)
    assert table.shared == {"epochs": "8", "lr": "0.05"}
    assert {row.change(table.shared) for row in table.rows} == {"-", "nothing else", "nesterov True", "momentum 0.8"}
    assert row_of(table, "epochs 8, lr 0.05, nesterov True")
    assert as_text([table]).count("lr 0.05") == 1
    assert "All differ from the reference in: epochs 8, lr 0.05. " in as_text([table])


def test_differences_have_the_pooled_error_and_holms_correction(make, tmp_path):
    """Against the same computed another way: scipy's analysis of all values."""
    groups = {0.01: (86.0, 86.3, 86.1), 0.02: (86.4, 86.6, 86.8), 0.05: (88.0, 88.1, 88.3), 0.1: (86.2,)}
    for lr, values in groups.items():
        for seed, value in enumerate(values):
            make(value, seed, lr=lr, dataset={"sha256": "another"}, epochs=8)
    table = compared(tmp_path)[1]
    spread = math.sqrt(sum(2 * statistics.variance(values) for values in groups.values() if len(values) > 1) / 6)
    assert table.spread == pytest.approx(spread)
    assert table.freedom == 6
    base = statistics.fmean(groups[0.01])
    raw = {}
    for lr in (0.02, 0.05, 0.1):
        difference = row_of(table, f"epochs 8, lr {lr}").difference
        error = spread * math.sqrt(1 / 3 + 1 / len(groups[lr]))
        assert difference.points == pytest.approx(statistics.fmean(groups[lr]) - base)
        assert difference.error == pytest.approx(error)
        raw[lr] = 2 * stats.t.sf(abs(difference.points) / error, 6)
        assert difference.p == pytest.approx(raw[lr])
    corrected = {lr: row_of(table, f"epochs 8, lr {lr}").difference.corrected_p for lr in raw}
    assert corrected[0.05] == pytest.approx(3 * raw[0.05])
    assert corrected[0.02] == pytest.approx(2 * raw[0.02])
    assert corrected[0.1] == pytest.approx(max(raw[0.1], 2 * raw[0.02]))
    text = as_text([table])
    assert "more than noise" in next(line for line in text.splitlines() if "lr 0.05" in line)
    assert "more than noise" not in next(line for line in text.splitlines() if "lr 0.1" in line)
    assert "Holm's correction for 3 comparisons, level 5 %" in method(table)


def test_noise_is_seldom_taken_for_more(make, tmp_path):
    """Under no difference at all, the level holds for all comparisons together."""
    import numpy as np

    from training.comparison import Row, _compare

    rng, false_alarms, run = np.random.default_rng(0), 0, read_run(REFERENCE)
    for _ in range(1000):
        rows = []
        for number in range(8):
            runs = []
            for accuracy in rng.normal(87, 0.3, 2):
                runs.append(copy.copy(run))
                object.__setattr__(runs[-1], "rows", [{"test_acc": accuracy}])
            rows.append(Row(runs, {"lr": str(number)} if number else {}))
        pooled = math.sqrt(sum(statistics.variance(row.values("test_acc")) for row in rows) / 8)
        _compare(rows, pooled, 8)
        false_alarms += any(row.difference and row.difference.corrected_p <= 0.05 for row in rows)
    assert 20 <= false_alarms <= 65


def test_one_seed_each_says_that_the_noise_is_unknown(make, tmp_path):
    make(88, lr=0.05)
    [table] = compared(tmp_path)
    assert str(row_of(table, "lr 0.05").difference).endswith(", noise unknown")
    assert "the noise is unknown: run more seeds" in method(table)


def test_runs_on_other_images_are_never_compared(make, tmp_path):
    for seed in (0, 1):
        make(95, seed, lr=0.05, dataset={"sha256": "others", "kind": "folder"})
        make(88, seed, lr=0.05)
    own, others = compared(tmp_path)
    assert others.dataset.startswith("folder")
    assert [row.difference for row in others.rows] == [None]
    assert row_of(own, "lr 0.05").difference.points == pytest.approx(88 - read_run(REFERENCE).rows[-1]["test_acc"])
    assert "nothing to compare" in method(others)


def test_with_validation_it_chooses_by_that_and_shows_both(make, tmp_path):
    for seed in (0, 1):
        make(80 + NOISE[seed], seed, validation=5000, epochs=8)
        make(82 + NOISE[seed], seed, validation=5000, epochs=8, lr=0.05)
    table = compared(tmp_path)[1]
    row = row_of(table, "validation 5000, epochs 8, lr 0.05")
    assert row.difference.points == pytest.approx(2)
    assert row.difference.to == row_of(table, "validation 5000, epochs 8").name()
    assert "points of validation accuracy" in method(table)
    assert re.search(r"82\.95 ± 0\.21 \(2\) +81\.95 ± 0\.21 \(2\)", as_text([table]))


def test_what_is_no_finished_run_is_named_and_left_out(make, tmp_path, capsys):
    whole, damaged, unfinished, foreign = make(88, lr=0.05), make(88, lr=0.1), make(88, lr=0.2), make(88, lr=0.3)
    (damaged / "model_accuracy.log").write_bytes(b"\xff\xfe")
    (unfinished / "summary.json").unlink()
    (foreign / "config.json").write_text(json.dumps({"config": {"seed": 1}}))
    (tmp_path / "runs" / "holiday").mkdir()
    assert main.main(["compare", "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    left_out = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 4
    for folder, words in ((damaged, "no whole run"), (unfinished, "not finished"), (foreign, "no whole run"),
                          (tmp_path / "runs" / "holiday", "no whole run")):
        assert any(folder.name in line and words in line for line in left_out)
    assert whole.name in out


def test_named_runs_only_and_the_reference_with_them(make, tmp_path, capsys):
    one, other = make(88, lr=0.05, name="one"), make(89, lr=0.1, name="other")
    assert main.main(["compare", one.name, "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert one.name in out
    assert read_run(REFERENCE).folder.name in out
    assert other.name not in out
    assert main.main(["compare", "nothing", "--log-dir", str(tmp_path)]) == 2
    assert "there is no run 'nothing'" in one_line(capsys.readouterr().err)
    (other / "summary.json").unlink()
    assert main.main(["compare", "other", "--log-dir", str(tmp_path)]) == 2
    assert f"there is nothing to compare: {other.name} is not finished" in one_line(capsys.readouterr().err)
    assert main.main(["compare", "--log-dir", str(tmp_path / "typo")]) == 2
    assert "there is no folder" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "typo").exists()


def test_a_name_that_several_runs_have_stands_for_all_of_them(make, tmp_path, capsys):
    for seed in range(2):
        make(88, seed, lr=0.05, name="mine")
    assert main.main(["compare", "mine", "--log-dir", str(tmp_path)]) == 0
    assert re.search(r"lr 0\.05 +0 1 ", capsys.readouterr().out)


def test_settings_without_effect_tell_no_runs_apart(make, tmp_path):
    for seed, shift in enumerate((0.1, 0.2)):
        make(88, seed, affine_p=0.0, shift=shift)
    make(88, coarse_dropout_size=8)
    make(88, teacher="wide:12345678", temperature=4.0)
    [table] = compared(tmp_path)
    assert len(row_of(table, "affine_p 0.0").runs) == 2
    row_of(table, "coarse_dropout_size 8")
    row_of(table, "teacher wide:12345678")  # and not the temperature, which is the default


def test_it_is_written_down_as_markdown_and_csv(make, tmp_path, capsys):
    for seed in (0, 1):
        make(88 + NOISE[seed], seed, lr=0.05)
    assert main.main(["compare", "--log-dir", str(tmp_path)]) == 0
    markdown = (tmp_path / "experiments.md").read_text()
    assert markdown == as_markdown(compared(tmp_path))
    assert "| lr 0.05 | 0 1 |" in markdown
    with open(tmp_path / "experiments.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[0]["test_acc"]) == pytest.approx(87.95)
    assert float(lines[0]["standard_error"]) > 0
    assert (tmp_path / "experiments.png").stat().st_size > 10_000
