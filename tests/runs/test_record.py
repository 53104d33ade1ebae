"""config.json and summary.json: what is written, and what is believed."""

import json
import subprocess
import sys

import pytest
from conftest import REFERENCE, ROOT, example_record, example_row

from config import UserError
from tinycnn.runs.files import make_run_folder, write
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
    (("config", "uncropped_share"), 1e308), (("config", "teacher"), 7), (("config", "epochs"), 10**400), (("procedure",), []),
    (("procedure", "augmentation"), 7)])
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


def test_versions_are_read_without_importing_the_packages():
    """A torchvision that doesn't fit torch must not end a run on a folder of images."""
    code = ("import sys\nsys.modules['torchvision'] = None\nsys.path.insert(0, sys.argv[1] + '/tests')\n"
            "from conftest import example_record\nassert example_record()['versions']['torchvision']")
    subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT, check=True)
