import json
import math
from pathlib import Path

import pandas
import pytest
import torch

from config import Config, UserError
from model import Net, convolutions, facts
from training import records
from training.records import Log, new_folder, read_log, read_run, write
from training.summary import receptive_fields, torch_summary


def record(**changes):
    return records.record(Config(**changes), facts(Net()), {
        "kind": "synthetic", "class_names": ["a", "b"], "sha256": "0", "train": 50000, "validation": 0, "test": 10000,
        "mean": [0.5] * 3, "deviation": [0.25] * 3}, "cpu")


def row(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "lr": 0.01 / (epoch + 1), "train_loss": 1.5, "train_acc": 45.678, "val_loss": 1.25, "val_acc": 1.0,
            "test_loss": math.nan, "test_acc": math.nan, "seconds": 9.876}


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(new_folder(tmp_path, "try", {"config.json": "{}"}), tmp_path, record(name="try", validation=10), [])


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = [new_folder(tmp_path, "x", {"config.json": str(number)}) for number in range(4)]
    assert len(set(folders)) == 4
    assert [(folder / "config.json").read_text() for folder in folders] == ["0", "1", "2", "3"]
    assert all(path.name.startswith("2") for path in (tmp_path / "runs").iterdir())


def test_a_log_reads_back_with_our_reader_and_with_pandas(log):
    log.start("summary")
    for epoch in range(3):
        log.rows.append(row(epoch))
        log.update()
    path = log.folder / "model_accuracy.log"
    comments, rows = read_log(path)
    assert comments == log.comments
    assert records.table(rows, log.columns()) == records.table(log.rows, log.columns())
    assert [r["lr"] for r in rows] == [0.01, 0.005, 0.003333]
    assert math.isnan(rows[0]["test_acc"])
    frame = pandas.read_csv(path, sep=r"\s+", comment="#")
    assert list(frame.columns) == list(records.FORMATS)
    assert frame["train_acc"].tolist() == [45.68] * 3
    assert frame["epoch"].tolist() == [0, 1, 2]
    assert len({len(line) for line in path.read_text().splitlines() if not line.startswith("#")}) == 1
    assert any("DEMONSTRATION" in line for line in comments)


def test_without_validation_its_columns_are_absent(tmp_path):
    log = Log(new_folder(tmp_path, "", {"config.json": "{}"}), tmp_path, record(), [row(0)])
    assert log.columns() == ["epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds"]
    assert all(len(line) <= 80 for line in (log.header(), log.last_row()))


def test_the_copy_is_that_of_the_run_started_last(tmp_path):
    first, second = (Log(new_folder(tmp_path, "", {"config.json": "{}"}), tmp_path, record(), []) for _ in range(2))
    for log in (first, second):
        log.start("summary of " + log.folder.name)
    first.rows.append(row(0))
    first.update()
    assert (tmp_path / "model_accuracy.log").read_text() == second.text()
    second.rows.append(row(0))
    second.update()
    assert (tmp_path / "model_accuracy.log").read_text() == second.text()
    assert (tmp_path / "torch_summary.log").read_text() == "summary of " + second.folder.name
    assert (first.folder / "model_accuracy.log").read_text() == first.text()


def test_no_record_holds_a_path(tmp_path):
    config = record(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path))
    assert str(tmp_path) not in json.dumps(config)
    assert str(tmp_path) not in "\n".join(records.comments("run", config))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write(target, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"epoch lr\n0 0.1 7\n", b"epoch lr\n0 x\n", b"lr epoch\n", b"epoch lr\n0 0.1\n2 0.1\n", b"what is this"])
def test_a_damaged_log_is_named(tmp_path, content):
    (tmp_path / "model_accuracy.log").write_bytes(content)
    with pytest.raises(UserError, match=r"model_accuracy\.log"):
        read_log(tmp_path / "model_accuracy.log")


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_a_damaged_config_is_named(log, content):
    log.start("")
    (log.folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_run(log.folder)


def test_a_run_without_summary_is_unfinished(log):
    log.start("")
    assert read_run(log.folder).summary is None
    write(log.folder / "summary.json", '{"test_acc": 1.5}')
    assert read_run(log.folder).summary == {"test_acc": 1.5}


def test_the_summary_opens_as_torchsummary_prints_it_and_ends_with_the_receptive_fields():
    net = Net().train()
    state, before = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    lines = torch_summary(net, convolutions(net), "cuda:0").splitlines()
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert lines[0] == "device: cuda:0"
    cells = [line.split() for line in lines[4:10]]
    assert [(row[0], row[-1]) for row in cells] == [
        ("Conv2d-1", "864"), ("BatchNorm2d-2", "64"), ("ReLU-3", "0"), ("Conv2d-4", "288"), ("Conv2d-5", "1,024"),
        ("BatchNorm2d-6", "64")]
    assert cells[0][1:5] == ["[-1,", "32,", "32,", "32]"]
    assert "Total params: 155,434" in lines
    fields = lines[next(i for i, line in enumerate(lines) if line.startswith("Convolution")) + 1:]
    assert len(fields) == 18
    assert fields[0].split() == ["input_block.0", "3x3", "1x1", "1x1", "[32,", "32,", "32]", "1", "3", "884,736"]
    assert fields[15].split()[:4] == ["conv_block4.1.0", "3x3", "1x1", "2x2"]


def test_what_could_not_be_followed_is_named_below_the_table():
    from test_model import Branching

    text = receptive_fields(convolutions(Branching()))
    assert text.splitlines()[-2].split()[-2:] == ["?", "147,456"]
    assert text.splitlines()[-1].startswith("?: last is given what no layer put out")


def test_a_run_is_known_by_its_folder_its_path_and_its_name(tmp_path, monkeypatch):
    older, newer, other = (tmp_path / "runs" / name for name in (
        "2026-01-01_00-00-00-mine", "2026-02-01_00-00-00-mine-2", "2026-03-01_00-00-00-not-mine"))
    for folder, name in ((older, "mine"), (newer, "mine"), (other, "not-mine")):
        folder.mkdir(parents=True)
        write(folder / "config.json", records.as_json({"config": {"name": name}}))
    (tmp_path / "runs" / "2026-04-01_00-00-00-mine").mkdir()  # no run
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()  # a name has no slash, a path may have one
    assert records.named_runs(tmp_path, "mine") == [newer, older]
    assert records.named_runs(tmp_path, "./mine") == [tmp_path / "mine"]
    assert records.named_runs(tmp_path, older.name) == records.named_runs(tmp_path, str(older)) == [older]
    for name in ("yours", ""):
        with pytest.raises(UserError, match=f"there is no run '{name}'"):
            records.named_runs(tmp_path, name)
