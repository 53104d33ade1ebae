"""python main.py sweep: which runs it makes, that it makes each once, and what it says of those that it doesn't make."""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest
from conftest import REFERENCE, SMALL, at_epoch, figures, one_line, raising, weights_of

from config import Config, UserError
from tinycnn.commands.parser import parse
from tinycnn.data.loading import DEMONSTRATION_EPOCHS
from tinycnn.errors import Diverged
from tinycnn.experiments import sweep as sweep_module
from tinycnn.experiments.claims import claim
from tinycnn.experiments.differences import COMMITTED_NETWORK, FIGURES
from tinycnn.experiments.sweep import (
    Outcome,
    PlannedRun,
    find_matching_run,
    make_claimed_run,
    make_run,
    make_runs_here,
    plan_runs,
    print_outcomes,
)
from tinycnn.runs.files import make_run_folder
from tinycnn.runs.finding import RunState, find_runs
from tinycnn.runs.record import CONFIG, as_json, read_record, read_run
from tinycnn.runs.weights import read_weights
from tinycnn.sources import present_sources


@pytest.fixture
def sweep(command, pictures, tmp_path):
    """sweep("--lr", "0.1,0.2") -> (status, stdout, stderr): a sweep on the small folder; logs in tmp_path/logs."""
    def sweep(*arguments: str):
        base = ["--dataset", "folder", "--data-dir", pictures, "--log-dir", tmp_path / "logs", *SMALL]
        return command("sweep", *base, *arguments)

    return sweep


@pytest.fixture
def plan(pictures, tmp_path):
    """plan("--lr", "0.1,0.2"): the runs of a sweep on the small folder, of two seeds unless it says otherwise."""
    def plan(*arguments: str) -> list[PlannedRun]:
        seeds = [] if "--seeds" in arguments else ["--seeds", "2"]
        runs = plan_runs(parse(["sweep", "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path), *SMALL,
                                *seeds, *arguments]).configs)[0]
        for planned in runs:
            planned.record["network"].pop("identity", None)  # as new runs are
        return runs

    return plan


def write_run(planned: PlannedRun, state: RunState = RunState.FINISHED, **changes: dict) -> Path:
    """The folder of a run as `planned` asks for it, but for `changes` of parts of its record; None takes a key away."""
    record = read_record(REFERENCE) | {part: read_record(REFERENCE).get(part, {}) | content
                                       for part, content in planned.record.items() if part != "network"}
    record["network"] = planned.record["network"]
    for part, content in changes.items():
        record[part] = {key: value for key, value in (record[part] | content).items() if value is not None}
    record = {part: content for part, content in record.items() if content != {}}
    mark = {RunState.FINISHED: "summary.json", RunState.DIVERGED: ".diverged", RunState.UNFINISHED: "checkpoint.pt"}[state]
    return make_run_folder(Path(planned.config.log_dir), "run", {CONFIG: as_json(record), mark: "{}"})


def training(plan: list[PlannedRun], trained: list[int]):
    """In place of main.train: leaves a finished run, and its seed in `trained`."""
    def train(config: Config, _: object) -> Path:
        trained.append(config.seed)
        return write_run(next(planned for planned in plan if planned.config == config))

    return train


def never(*_: object) -> Path:
    raise AssertionError("this should not be called")


# ---------------------------------------------------------------- which runs

def test_a_plan_says_what_varies_and_can_be_sent_to_another_process(plan):
    planned = plan("--lr", "0.01,0.05", "--epochs", "3")
    assert [each.description for each in planned] == [
        "lr 0.01, seed 0", "lr 0.05, seed 0", "lr 0.01, seed 1", "lr 0.05, seed 1"]
    assert pickle.loads(pickle.dumps(planned)) == planned


def test_combinations_that_train_the_same_are_one_run(plan, capsys):
    planned = plan("--affine-p", "0,0.5", "--shift", "0.05,0.1", "--seeds", "1")
    assert [(each.config.affine_p, each.config.shift) for each in planned[1:]] == [(0.5, 0.05), (0.5, 0.1)]
    assert planned[0].config.affine_p == 0
    assert "left out 1 of 4 combinations: they differ from others only in settings without effect" in capsys.readouterr().out


def with_changes(planned: PlannedRun, part: str, **changes) -> PlannedRun:
    return dataclasses.replace(planned, record=planned.record | {part: planned.record[part] | changes})


def test_the_key_is_that_of_the_run_and_not_of_how_it_is_made(plan, edited):
    one, other_seed = plan("--epochs", "3")
    same = plan("--epochs", "3", "--name", "again", "--batches", "workers", "--tensorboard")[0]
    others = [other_seed, *(plan("--epochs", "3", *more)[0] for more in (["--validation", "9"], ["--lr", "0.02"])),
              with_changes(one, "dataset", sha256="of other images"), with_changes(one, "network", receptive_field=63)]
    edited("augmentation.py", r"p=config.flip_p\b", "p=0")
    others += plan("--epochs", "3")[:1]
    assert same.key == one.key
    assert len({planned.key for planned in [one, *others]}) == len(others) + 1


def test_a_run_is_found_by_settings_seed_images_network_and_code(plan, edited):
    one, other_seed = plan()
    folder = write_run(one)
    assert find_matching_run(one) == (RunState.FINISHED, folder)
    edited("model.py", "features", "maps")
    for other in (other_seed, plan()[0], with_changes(one, "dataset", sha256="others"), with_changes(one, "config", lr=0.5),
                  with_changes(one, "network", multiply_adds=1)):
        assert find_matching_run(other)[0] is RunState.FOREIGN


@pytest.mark.parametrize(("network", "found"), [
    ({"identity": COMMITTED_NETWORK["identity"]}, True), ({"identity": "edited"}, False), ({}, True),
    ({"parameters": 7}, False)])
def test_a_run_from_before_sources_is_found_by_what_it_recorded(plan, network, found):
    one = plan()[0]
    one.record["network"].update({name: COMMITTED_NETWORK[name] for name in FIGURES})  # three classes have fewer parameters
    write_run(one, network=network, sources={"version": None, "edited": None})
    assert (find_matching_run(one)[0] is RunState.FINISHED) == found


def test_of_several_matching_runs_a_finished_one_is_found(plan):
    one = plan()[0]
    folders = {state: write_run(one, state) for state in (RunState.FINISHED, RunState.DIVERGED, RunState.UNFINISHED)}
    for state, folder in folders.items():
        assert find_matching_run(one) == (state, folder)
        for path in folder.iterdir():
            path.unlink()
    (write_run(one) / CONFIG).write_text('{"config": 5}')  # damaged
    assert find_matching_run(one)[0] is RunState.FOREIGN


def test_a_demonstration_is_planned_with_its_few_epochs(plan, monkeypatch):
    images = sweep_module.load_dataset("folder", plan()[0].config.data_dir)
    monkeypatch.setattr(sweep_module, "load_dataset", lambda *_: dataclasses.replace(images, kind="synthetic"))
    [demonstration], _ = plan_runs([Config()])
    assert demonstration.record["config"]["epochs"] == DEMONSTRATION_EPOCHS < Config().epochs


def test_a_teacher_is_known_by_its_weights(plan, monkeypatch):
    teacher = REFERENCE / "final.safetensors"
    assert plan("--teacher", str(teacher))[0].record["config"]["teacher"].endswith(read_weights(teacher).digest[:8])
    monkeypatch.setattr(sweep_module, "load_dataset", never)
    with pytest.raises(UserError, match="--teacher: there is no run"):
        plan("--teacher", "nobody")


def test_a_log_folder_that_is_a_runs_is_refused_before_the_images_are_loaded(plan, monkeypatch):
    planned = plan()[0]
    folder = write_run(planned)
    monkeypatch.setattr(sweep_module, "load_dataset", never)
    with pytest.raises(UserError, match="is the folder of a run"):
        plan_runs([dataclasses.replace(planned.config, log_dir=str(folder))])


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lr", "0.1,fast"], "'0.1,fast' must be floats, separated by commas"),
    (["--lr", "0.1,-1"], "--lr is -1.0, but must lie in"), (["--epochs", "8,"], "'8,' must be ints")])
def test_what_makes_no_sweep_is_refused_before_it_begins(arguments, words, command):
    status, _, err = command("sweep", *arguments)
    assert status == 2
    assert words in one_line(err)


# ---------------------------------------------------------------- making them

def test_a_run_is_claimed_while_it_trains(plan, capsys):
    planned, trained = plan(), []
    finish = training(planned, trained)

    def train(config: Config, run: None) -> Path:
        assert make_run(planned[config.seed], never) is Outcome.ELSEWHERE
        return finish(config, run)

    assert make_runs_here(planned, train) == [Outcome.TRAINED] * 2
    assert trained == [0, 1]
    assert make_runs_here(planned, never) == [Outcome.PRESENT] * 2
    assert capsys.readouterr().out.count("under way in another sweep: skipped") == 2


def test_a_run_that_another_sweep_makes_is_looked_at_again_at_the_end(plan, tmp_path, capsys):
    planned, trained = plan(), []
    finish = training(planned, trained)
    elsewhere = claim(tmp_path, planned[0].key)
    assert elsewhere.__enter__()

    def train(config: Config, run: None) -> Path:
        write_run(planned[0])  # meanwhile it ends
        elsewhere.__exit__(None, None, None)
        return finish(config, run)

    assert make_runs_here(planned, train) == [Outcome.PRESENT, Outcome.TRAINED]
    assert trained == [1]
    assert "\nRun 1 of 2 again: seed 0\nalready finished: run" in capsys.readouterr().out


def test_a_run_that_is_still_under_way_is_told_at_the_end(plan, tmp_path, capsys):
    planned, trained = plan(), []
    with claim(tmp_path, planned[0].key):
        outcomes = make_runs_here(planned, training(planned, trained))
    print_outcomes(planned, outcomes)
    out = capsys.readouterr().out
    assert "1 of 2 runs are finished\n1 under way elsewhere (seed 0); repeat the sweep when they have ended" in out


def test_a_run_that_trains_outside_of_a_sweep_is_skipped(plan, monkeypatch, capsys):
    folder = write_run(plan()[0], RunState.UNFINISHED)
    monkeypatch.setattr(sweep_module, "is_running", lambda folder: True)
    assert make_run(plan()[0], never) is Outcome.ELSEWHERE
    assert folder.name in capsys.readouterr().out


def test_a_worker_with_other_files_trains_nothing(plan, edited):
    planned = plan()[0]
    edited("tinycnn/data/device_policy.py", r"return (.*permute.*)", r"return \1.flip(-2)")
    with pytest.raises(UserError, match=r"^tinycnn/data/device_policy.py of this process is not that of the sweep: start"):
        make_claimed_run(planned, never)


def test_a_diverged_run_is_named_and_not_resumed(plan, capsys):
    planned = plan()
    folder = write_run(planned[0], RunState.DIVERGED)
    outcomes = make_runs_here(planned, lambda *_: raising(Diverged("the loss became nan"))())
    print_outcomes(planned, outcomes)
    out = capsys.readouterr().out
    assert f"diverged: {folder.name}" in out
    assert "diverged: the loss became nan" in out
    assert "0 of 2 runs are finished\n2 diverged (seed 0; seed 1)\n" in out


def test_a_picture_that_fails_ends_no_sweep(plan, capsys):
    planned, trained = plan(), []
    finish = training(planned, trained)

    def train(config: Config, run: None) -> Path:
        finish(config, run)
        raise RuntimeError("no LaTeX")

    assert make_runs_here(planned, train) == [Outcome.TRAINED] * 2
    assert capsys.readouterr().out.count("what came after it failed: RuntimeError: no LaTeX") == 2
    with pytest.raises(RuntimeError, match="no LaTeX") as failed:  # but a run that isn't finished does
        make_runs_here(plan("--lr", "0.5"), lambda *_: raising(RuntimeError("no LaTeX"))())
    assert failed.value.__notes__ == ["or repeat the sweep, which skips what is finished"]


# ---------------------------------------------------------------- the whole program

def test_a_sweep_makes_its_runs_goes_on_where_it_was_interrupted_and_compares_them(sweep, run, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 1, raising(KeyboardInterrupt()))
    arguments = ("--epochs", "1", "--lr", "0.01,0.05")
    status, _, err = sweep(*arguments)
    assert status == 130
    assert "or repeat the sweep, which skips what is finished" in one_line(err)
    status, out, err = sweep(*arguments)
    assert (status, err) == (0, "")
    assert out.count("already finished: ") == 1
    assert "Run 2 of 2: lr 0.05, seed 0\n" in out
    assert "2 of 2 runs are finished" in out
    assert "Differences are in points of test accuracy" in " ".join(out.split())
    folders = find_runs(tmp_path / "logs")
    assert [read_run(folder).record["config"]["lr"] for folder in folders] == [0.05, 0.01]
    assert (tmp_path / "logs" / "experiments.csv").exists()
    assert (tmp_path / "logs" / "experiments.png").stat().st_size > 10_000
    assert run("--epochs", "1", "--lr", "0.05")[0] == 0  # the same code path as a single run
    single = find_runs(tmp_path / "logs")[0]
    assert weights_of(single) == weights_of(folders[0])
    assert figures(single) == figures(folders[0])


def test_an_edit_makes_other_runs_and_a_comment_does_not(sweep, tmp_path, edited):
    assert sweep("--epochs", "1", "--seeds", "2")[0] == 0
    edited("main.py", r"\Z", "# the end\n")
    assert sweep("--epochs", "1", "--seeds", "2")[1].count("already finished: ") == 2
    edited("main.py", r"\Z", "x = 1\n")
    status, out, _ = sweep("--epochs", "1", "--seeds", "2")
    assert status == 0
    assert len(find_runs(tmp_path / "logs")) == 4
    assert read_record(find_runs(tmp_path / "logs")[0])["sources"] == present_sources()
    assert re.search(r"^main\.py edited +2 ", out, re.MULTILINE)
    assert re.search(r"^  diff \S+/main\.py \S+/main\.py$", out, re.MULTILINE)


def test_a_run_that_diverges_does_not_end_the_sweep(sweep, tmp_path):
    status, out, _ = sweep("--epochs", "2", "--lr", "1000,0.01", "--weight-decay", "10")
    assert status == 0
    assert "1 of 2 runs are finished\n1 diverged (lr 1000.0, seed 0)\n" in out
