"""model_accuracy.log, written and read."""

import math

import pandas
import pytest
from conftest import example_record, example_row

from config import UserError
from tinycnn.runs.files import make_run_folder
from tinycnn.runs.log import FORMATS, AccuracyLog, comments, read_log, table


def row(epoch: int) -> dict[str, float]:
    return example_row(epoch) | {"val_loss": 1.25, "val_acc": 1.0, "test_loss": math.nan, "test_acc": math.nan}


@pytest.fixture
def log(tmp_path) -> AccuracyLog:
    return AccuracyLog(make_run_folder(tmp_path, "try", {"config.json": "{}"}), tmp_path,
                       example_record(name="try", validation=10), [])


def test_a_log_reads_back_with_our_reader_and_with_pandas(log):
    log.start("summary")
    for epoch in range(3):
        log.rows.append(row(epoch))
        log.update()
    path = log.folder / "model_accuracy.log"
    read_comments, rows = read_log(path)
    assert read_comments == log.comments
    assert table(rows, log.columns) == table(log.rows, log.columns)
    assert [r["lr"] for r in rows] == [0.01, 0.005, 0.003333]
    assert math.isnan(rows[0]["test_acc"])
    frame = pandas.read_csv(path, sep=r"\s+", comment="#")
    assert list(frame.columns) == list(FORMATS)
    assert frame["train_acc"].tolist() == [45.68] * 3
    assert frame["test_acc"].isna().all()
    assert frame["epoch"].tolist() == [0, 1, 2]
    assert len({len(line) for line in path.read_text().splitlines() if not line.startswith("#")}) == 1
    assert any("DEMONSTRATION" in line for line in read_comments)


def test_without_validation_its_columns_are_absent(tmp_path):
    log = AccuracyLog(make_run_folder(tmp_path, "x", {"config.json": "{}"}), tmp_path, example_record(), [example_row(0)])
    assert log.columns == ["epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"]
    assert all(len(line) <= 80 for line in (log.header(), log.last_row()))


def test_the_terminal_shows_a_dash_for_a_test_that_is_yet_to_come(log):
    log.rows.append(row(0))
    assert log.last_row().split()[6:8] == ["-", "-"]
    assert "nan" in log.text()


def test_the_copy_is_that_of_the_run_started_last(tmp_path):
    first, second = (AccuracyLog(make_run_folder(tmp_path, "x", {"config.json": "{}"}), tmp_path, example_record(), [])
                     for _ in range(2))
    for log in (first, second):
        log.start("summary of " + log.folder.name)
    first.rows.append(example_row(0))
    first.update()
    assert (tmp_path / "model_accuracy.log").read_text() == second.text()
    second.rows.append(example_row(0))
    second.update()
    assert (tmp_path / "model_accuracy.log").read_text() == second.text()
    assert (tmp_path / "torch_summary.log").read_text() == "summary of " + second.folder.name
    assert (first.folder / "model_accuracy.log").read_text() == first.text()


def test_the_config_line_shows_what_differs_from_the_defaults():
    line = next(line for line in comments("run", example_record(lr=0.05, epochs=3)) if line.startswith("config: "))
    assert line.startswith("config: batches='device' epochs=3 lr=0.05 threads=1 (")


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"epoch lr\n0 0.1 7\n", b"epoch lr\n0 x\n", b"lr epoch\n", b"what is this",
    b"epoch lr train_loss train_acc test_loss test_acc seconds\n0 0.1 1 50 1 50 1\n2 0.1 1 50 1 50 1\n",
    b"epoch lr train_loss train_acc test_loss test_acc seconds\n0 0.1 1 101 1 1 1\n",
    b"epoch lr train_loss train_acc test_loss test_acc seconds\n0 0.1 1 50 1 -1 1\n"])
def test_a_damaged_log_is_named(tmp_path, content):
    (tmp_path / "model_accuracy.log").write_bytes(content)
    with pytest.raises(UserError, match=r"model_accuracy\.log"):
        read_log(tmp_path / "model_accuracy.log")


def test_a_new_column_stands_before_the_seconds_and_is_read_back(log):
    """One that main.py adds to its rows, from some epoch on."""
    log.rows = [row(0), row(1) | {"grad_norm": 1.25}]
    log.start("")
    assert log.columns == [*[name for name in FORMATS if name != "seconds"], "grad_norm", "seconds"]
    rows = read_log(log.folder / "model_accuracy.log")[1]
    assert math.isnan(rows[0]["grad_norm"])
    assert rows[1]["grad_norm"] == 1.25
    assert log.last_row().split()[-2] == "1.25"


def test_a_figure_of_many_digits_stays_in_its_column(log):
    log.rows = [row(0) | {"train_loss": 12345678901234567890.1234, "lr": 1000.0}]
    lines = log.text().splitlines()[-2:]
    assert len(lines[0]) == len(lines[1])
    assert lines[1].split()[2] == "1.23e+19"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\udcffb"])
def test_a_comment_is_a_printable_line_whatever_a_run_is_called(name):
    assert all(line.isprintable() for line in comments(name, example_record()))
