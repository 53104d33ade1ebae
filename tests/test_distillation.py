"""Distillation: whole runs with a teacher."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REFERENCE, at_epoch, figures, one_line, raising, weights_of

from config import Config
from tinycnn.experiments.differences import effective_settings
from tinycnn.experiments.sweep import find_matching_run, plan_runs
from tinycnn.runs.finding import RunState, find_runs
from tinycnn.runs.record import FINAL, read_run
from tinycnn.runs.run import local_paths, restore_config
from tinycnn.runs.weights import read_weights


@pytest.fixture
def taught(run, tmp_path):
    """A function that trains with the teacher `wide`, a run of one epoch: taught("--epochs", "2") -> (status, stderr,
    folder)."""
    assert run("--epochs", "1", "--width", "2", "--name", "wide", "--seed", "5")[0] == 0
    [wide] = find_runs(tmp_path / "logs")

    def taught(*arguments: str, teacher: str = "wide"):
        status, _, err = run("--teacher", teacher, *arguments)
        return status, err, find_runs(tmp_path / "logs")[0]

    taught.wide = wide
    return taught


def test_a_run_learns_from_its_teacher(run, tmp_path, taught):
    status, err, folder = taught("--epochs", "2", "--name", "taught")
    assert (status, err) == (0, "")
    assert folder.name.endswith("taught")
    record = read_run(folder).record
    assert record["network"]["parameters"] < read_run(taught.wide).record["network"]["parameters"] / 3
    assert record["config"]["teacher"] == read_weights(taught.wide / "final.safetensors").name
    _, _, without = taught("--epochs", "2", "--name", "without", teacher="")
    assert weights_of(without) != weights_of(folder)
    assert read_run(without).record["config"]["teacher"] == ""


def test_what_a_teacher_is_called_by_is_no_part_of_the_run(tmp_path, taught):
    one, other = (taught("--epochs", "1", "--name", "taught", teacher=name)[2] for name in ("wide", str(taught.wide)))
    assert one != other
    assert weights_of(one) == weights_of(other)
    for path in other.glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes() or path.suffix == ".pt"


def test_a_run_learns_from_several_teachers(run, tmp_path, taught, monkeypatch):
    assert run("--epochs", "1", "--name", "other", "--seed", "6")[0] == 0
    other = find_runs(tmp_path / "logs")[0]
    _, _, alone = taught("--epochs", "2", "--name", "alone")
    status, err, both = taught("--epochs", "2", "--name", "both", teacher=f"wide,{other}")
    assert (status, err) == (0, "")
    names = [read_weights(folder / "final.safetensors").name for folder in (taught.wide, other)]
    assert read_run(both).record["config"]["teacher"] == ",".join(names)
    assert weights_of(both) != weights_of(alone)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "logs" / "runs")
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        status, _, folder = taught("--epochs", "2", "--name", "both", teacher=f"{taught.wide.name},{other.name}")
    assert (status, folder != both) == (130, True)
    assert run("--resume")[0] == 0  # from another folder
    assert figures(folder) == figures(both)


def test_runs_of_two_teachers_are_not_one_group_nor_one_for_a_sweep(run, tmp_path, taught, pictures):
    _, _, first = taught("--epochs", "1", "--name", "taught")
    paths = {"log_dir": str(tmp_path / "logs"), "data_dir": str(pictures), "teacher": "wide"}
    config = restore_config({"record": read_run(first).record, "places": paths}, first)
    assert find_matching_run(plan_runs([config])[0][0]) == (RunState.FINISHED, first)
    assert run("--epochs", "1", "--width", "3", "--name", "wide", "--seed", "6")[0] == 0
    assert find_matching_run(plan_runs([config])[0][0])[0] is RunState.FOREIGN
    _, _, second = taught("--epochs", "1", "--name", "taught", "--seed", "1")
    assert effective_settings(read_run(first).record["config"]) != effective_settings(read_run(second).record["config"])


def test_a_teacher_without_a_share_changes_no_bit(run, taught):
    _, _, ignoring = taught("--epochs", "2", "--name", "ignoring", "--teacher-share", "0")
    _, _, without = taught("--epochs", "2", "--name", "without", teacher="")
    assert ignoring != without
    assert figures(ignoring) == figures(without)


def test_a_resumed_run_has_the_same_teacher(run, tmp_path, taught, monkeypatch):
    _, _, whole = taught("--epochs", "3", "--name", "whole")
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        status, _, folder = taught("--epochs", "3", "--name", "whole")
    assert (status, folder != whole) == (130, True)
    status, _, err = run("--resume", "--teacher", str(whole))
    assert status == 2
    assert "is not the one that run" in one_line(err)
    renamed = taught.wide.rename(tmp_path / "renamed")
    assert run("--resume", "--teacher", str(renamed))[0] == 0  # the same, by another name
    assert figures(folder) == figures(whole)


def test_a_teacher_in_a_folder_with_a_comma_is_found_again(tmp_path, monkeypatch):
    teacher, config = read_weights(REFERENCE / "final.safetensors"), Config(teacher="wide")
    monkeypatch.chdir(tmp_path)
    for folder in ("a,b", "ab"):
        Path(folder).mkdir()
        shutil.copy(teacher.path, folder)
    places = [local_paths(SimpleNamespace(config=config, teachers=[replace(teacher, path=Path(folder, FINAL))]))["teacher"]
              for folder in ("a,b", "ab", "gone")]
    assert places == ["wide", str(tmp_path / "ab" / FINAL), "wide"]


def test_a_run_finds_its_teacher_again_beside_a_folder_and_a_newer_run_of_that_name(run, tmp_path, taught, monkeypatch):
    _, _, whole = taught("--epochs", "3", "--name", "whole")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide").mkdir()
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        folder = taught("--epochs", "3", "--name", "stopped")[2]
    assert run("--epochs", "1", "--width", "2", "--name", "wide", "--seed", "6")[0] == 0
    assert run("--resume", "stopped")[0] == 0
    assert figures(folder) == figures(whole)


@pytest.mark.parametrize(("arguments", "teacher", "said"), [
    ((), "nobody", "there is no run 'nobody'"),
    ((), "wide,nobody", "there is no run 'nobody'"),
    ((), "wide,", "--teacher is 'wide,': put one comma between two names, and none at the end"),
    (("--validation", "6"), None, "was trained on other images than this run's, or held others out"),
    (("--teacher-share", "1.5"), None, "--teacher-share is 1.5, but must lie in 0 to 1"),
    (("--temperature", "0"), None, "--temperature is 0.0, but must lie in 0.1 to 100"),
    (("--width", "0"), None, "--width is 0, but must lie in 1 to 16"),
])
def test_a_wrong_teacher_is_named(tmp_path, taught, arguments, teacher, said):
    status, err, folder = taught(*arguments, teacher=teacher or "wide")
    assert status == 2
    assert said in one_line(err)
    assert folder == taught.wide  # no other was made


def test_a_wide_network_is_used_like_any(command, taught, pictures, tmp_path):
    for verb in (("predict", pictures / "test"), ("test", "--data-dir", pictures)):
        status, out, _ = command(*verb, "--log-dir", tmp_path / "logs", "--device", "cpu")
        assert status == 0
    assert "24 test images" in out
