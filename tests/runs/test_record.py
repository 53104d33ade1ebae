"""config.json and summary.json: what is written, and what is believed."""

import json
import math
import sys

import pytest
from conftest import REFERENCE, example_inputs, example_record, example_row

from config import UserError
from tinycnn.runs.files import make_run_folder, write
from tinycnn.runs.inputs import make_record
from tinycnn.runs.log import AccuracyLog, comments
from tinycnn.runs.record import as_json, read_record, read_run, summarize


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that has begun."""
    record = example_record()
    folder = make_run_folder(tmp_path, "try", {"config.json": as_json(record)})
    AccuracyLog(folder, tmp_path, record, [example_row(0)]).start("")
    return folder


def test_no_record_holds_a_path(tmp_path):
    record = example_record(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path))
    assert str(tmp_path) not in json.dumps(record)
    assert str(tmp_path) not in "\n".join(comments("run", record))


def test_a_record_is_read_as_it_was_written(folder):
    assert read_record(folder) == example_record()


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, '{"a":' * 100_000, "\ud800"])
def test_a_damaged_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(folder)


@pytest.mark.parametrize(("keys", "value"), [
    (("config", "seed"), "1"), (("config", "seed"), True), (("config", "lr"), [0.1]), (("config",), []), (("network",), None),
    (("network", "parameters"), 1.5), (("network", "receptive_field"), "79"), (("dataset", "class_names"), "abc"),
    (("dataset", "class_names"), [1, 2]), (("dataset", "mean"), [0.5]), (("dataset", "train"), -0.5), (("notes",), "none"),
    (("notes",), [1]), (("machine", "device"), 3), (("versions",), []), (("config", "uncropped_share"), float("nan")),
    (("config", "whole_images_share"), 1e308), (("sources",), 7),
    (("config", "teacher"), 7), (("config", "epochs"), 10**400), (("procedure",), []), (("procedure",), {"augmentation": 7})])
def test_wrong_types_in_config_json_are_not_believed(folder, keys, value):
    record = example_record()
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    write(folder / "config.json", as_json(record))
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(folder)


@pytest.mark.parametrize("name", ["config", "network", "dataset", "machine", "versions", "notes"])
def test_a_missing_part_of_config_json_is_not_believed(folder, name):
    record = example_record()
    del record[name]
    write(folder / "config.json", as_json(record))
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(folder)


def test_a_run_is_finished_by_its_summary(folder):
    assert read_run(folder).summary is None
    write(folder / "summary.json", as_json(summarize([example_row(0)])))
    assert read_run(folder).summary["test_acc"] == 1.0
    for damaged in ('{"test_acc": 1.5}', '{"epochs": "80"}', "[]"):
        write(folder / "summary.json", damaged)
        with pytest.raises(UserError, match=r"summary\.json"):
            read_run(folder)


def test_runs_of_before_are_readable():
    for config in REFERENCE.rglob("config.json"):
        run = read_run(config.parent)
        assert run.summary["epochs"] == len(run.rows)


def test_versions_are_read_without_importing_the_packages(monkeypatch):
    """An OpenCV that can't be imported must not end a run."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert make_record(example_inputs(), {}, 1)["versions"]["cv2"]


def test_a_summary_has_the_last_epochs_figures_and_the_seconds_of_all():
    rows = [example_row(0) | {"seconds": 1.5}, example_row(1) | {"seconds": 2.25, "test_acc": 7.0, "val_acc": math.nan}]
    assert summarize(rows) == {"epochs": 2, "train_loss": 1.5, "train_acc": 45.678, "test_loss": 1.25, "test_acc": 7.0,
                               "seconds": 3.75}


def test_records_of_earlier_versions_have_the_present_names(folder):
    record = example_record()
    del record["config"]["whole_images_share"]
    record["config"] |= {"uncropped_share": 0.2, "capture": True, "warmup": 0.0}
    write(folder / "config.json", as_json(record))
    settings = read_record(folder)["config"]
    assert (settings["whole_images_share"], settings["capture"], settings["warmup"]) == (0.2, "on", 0)
    assert "uncropped_share" not in settings
