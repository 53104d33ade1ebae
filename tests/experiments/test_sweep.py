"""python main.py sweep: which runs it makes, that it makes each once, and what it says of those that it doesn't make."""

import dataclasses
import os
import pickle
import re
import time
from pathlib import Path

import albumentations as A
import pytest
from conftest import REFERENCE, SMALL, at_epoch, figures, one_line, raising, start_program, synthetic, weights_of

from config import Config, UserError
from model import Net
from tinycnn.commands.parser import parse
from tinycnn.data import batches as making
from tinycnn.data.leftovers import DAY
from tinycnn.experiments import sweep as sweep_module
from tinycnn.experiments.sweep import (
    Outcome,
    PlannedRun,
    find_matching_run,
    make_claimed_run,
    make_run,
    make_runs_here,
    plan_runs,
)
from tinycnn.network.identity import describe_network
from tinycnn.runs.files import lock_file, make_run_folder
from tinycnn.runs.finding import RunState, find_runs
from tinycnn.runs.record import CONFIG, as_json, read_record, read_run
from tinycnn.runs.resuming import LOCK
from tinycnn.runs.weights import read_weights
from tinycnn.training.errors import Diverged


@pytest.fixture
def sweep(command, pictures, tmp_path):
    """sweep("--lr", "0.1,0.2") -> (status, stdout, stderr): a sweep on the small folder; logs in tmp_path/logs."""
    def sweep(*arguments: str):
        base = ["--dataset", "folder", "--data-dir", pictures, "--log-dir", tmp_path / "logs", *SMALL]
        return command("sweep", *base, *arguments)

    return sweep


@pytest.fixture
def configs(pictures, tmp_path):
    """configs("--lr", "0.1,0.2"): the configs of a sweep on the small folder."""
    def configs(*arguments: str) -> list[Config]:
        return parse(["sweep", "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path), *SMALL,
                      *arguments]).configs

    return configs


def write_run(planned, state: RunState = RunState.FINISHED, **changes) -> Path:
    """The folder of a run as `planned` asks for it, but for `changes` in its network."""
    config, record = planned.config, read_record(REFERENCE)
    record["config"] = vars(config)
    record["dataset"]["sha256"] = planned.fingerprint
    record["network"] = {name: value for name, value in (planned.network | changes).items() if value is not None}
    mark = {RunState.FINISHED: "summary.json", RunState.DIVERGED: ".diverged", RunState.UNFINISHED: "checkpoint.pt"}[state]
    return make_run_folder(Path(config.log_dir), "run", {CONFIG: as_json(record), mark: "{}"})


def planned_runs(configs: list[Config]) -> list[PlannedRun]:
    return plan_runs(configs)[0]


def never(*_: object) -> Path:
    raise AssertionError("this run should not be trained")


# ---------------------------------------------------------------- which runs

def test_a_plan_says_what_varies_and_can_be_sent_to_another_process(configs):
    plan = planned_runs(configs("--lr", "0.01,0.05", "--epochs", "3", "--seeds", "2"))
    assert [planned.description for planned in plan] == [
        "lr 0.01, seed 0", "lr 0.05, seed 0", "lr 0.01, seed 1", "lr 0.05, seed 1"]
    assert len({planned.key for planned in plan}) == 4
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_combinations_that_train_the_same_are_one_run(configs, capsys):
    plan = planned_runs(configs("--affine-p", "0,0.5", "--shift", "0.05,0.1"))
    assert [(planned.config.affine_p, planned.config.shift) for planned in plan[1:]] == [(0.5, 0.05), (0.5, 0.1)]
    assert plan[0].config.affine_p == 0
    assert "1 of the 4 combinations change only what has no effect" in capsys.readouterr().out


def test_the_key_is_that_of_the_run_and_not_of_how_it_is_made(configs, monkeypatch):
    [one, *_], [same, *_] = (planned_runs(configs("--seeds", "2", "--epochs", "3", *more)) for more in (
        [], ["--name", "again", "--batches", "workers", "--tensorboard"]))
    others = [planned_runs(configs("--seeds", "2", "--epochs", "3", *more))[0] for more in (
        ["--validation", "9"], ["--lr", "0.02"], ["--dropout", "0.1"])]
    others += [dataclasses.replace(one, fingerprint="of other images"),
               dataclasses.replace(one, procedure=one.procedure | {"schedule": "edited"})]
    monkeypatch.setattr(sweep_module, "describe_network", lambda net: describe_network(net) | {"identity": "edited"})
    others += planned_runs(configs("--seeds", "2", "--epochs", "3"))
    assert same.key == one.key
    assert len({planned.key for planned in [one, *others]}) == len(others) + 1


def test_a_run_is_found_by_settings_seed_images_and_network(configs):
    one, other_seed = planned_runs(configs("--seeds", "2"))
    folder = write_run(one)
    assert find_matching_run(one) == (RunState.FINISHED, folder)
    assert find_matching_run(other_seed) is None
    for changed in (dataclasses.replace(one, fingerprint="others"),
                    dataclasses.replace(one, network=one.network | {"identity": "edited"}),
                    dataclasses.replace(one, procedure=one.procedure | {"augmentation": "edited"}),
                    dataclasses.replace(one, settings=one.settings | {"lr": 0.5})):
        assert find_matching_run(changed) is None


def test_a_run_from_before_identities_is_found_by_its_networks_figures(configs):
    one, _ = planned_runs(configs("--seeds", "2"))
    folder = write_run(one, identity=None, model_sha256="whatever")
    assert find_matching_run(one) == (RunState.FINISHED, folder)
    write_run(planned_runs(configs("--seeds", "2"))[1], identity=None, receptive_field=63)
    assert find_matching_run(planned_runs(configs("--seeds", "2"))[1]) is None


def test_of_several_matching_runs_a_finished_one_is_found(configs):
    one, _ = planned_runs(configs("--seeds", "2"))
    folders = {state: write_run(one, state) for state in (RunState.FINISHED, RunState.DIVERGED, RunState.UNFINISHED)}
    for state in folders:
        assert find_matching_run(one) == (state, folders[state])
        for path in folders[state].iterdir():
            path.unlink()


def test_a_damaged_run_is_passed_over(configs):
    one, _ = planned_runs(configs("--seeds", "2"))
    (write_run(one) / CONFIG).write_text('{"config": 5}')
    assert find_matching_run(one) is None


def test_a_teacher_is_known_by_its_weights(configs):
    teacher = REFERENCE / "final.safetensors"
    one, _ = planned_runs(configs("--seeds", "2", "--teacher", str(teacher)))
    assert one.settings["teacher"] == read_weights(teacher).digest[:8]


def test_a_missing_teacher_is_told_before_the_images_are_loaded(configs, monkeypatch):
    monkeypatch.setattr(sweep_module, "load_images", never)
    with pytest.raises(UserError, match="--teacher: there is no run"):
        planned_runs(configs("--seeds", "2", "--teacher", "nobody"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lr", "0.1,fast"], "'0.1,fast' must be floats, separated by commas"),
    (["--lr", "0.1,-1"], "--lr is -1.0, but must lie in"),
    (["--epochs", "8,"], "'8,' must be ints"), (["--seed", "1"], "unknown argument --seed"),
    (["--speed", "1"], "unknown argument --speed")])
def test_what_makes_no_sweep_is_refused_before_it_begins(arguments, words, command):
    status, _, err = command("sweep", *arguments)
    assert status == 2
    assert words in one_line(err)


# ---------------------------------------------------------------- making them

def test_a_log_folder_that_is_a_runs_is_refused_before_the_images_are_loaded(configs, monkeypatch):
    planned = planned_runs(configs("--seeds", "2"))[0]
    folder = write_run(planned)
    monkeypatch.setattr(sweep_module, "load_images", never)
    with pytest.raises(UserError, match="is the folder of a run"):
        plan_runs([dataclasses.replace(planned.config, log_dir=str(folder))])


def test_a_run_that_another_sweep_holds_is_skipped(configs, tmp_path, monkeypatch, capsys):
    plan = planned_runs(configs("--seeds", "2"))
    held = plan[0].key
    monkeypatch.setattr("tinycnn.experiments.claims.lock_file",  # a process's own locks don't keep it out
                        lambda path: None if held in path.name else lock_file(path))
    trained: list[Config] = []
    outcomes = make_runs_here(plan, lambda config: trained.append(config))
    assert outcomes == [Outcome.ELSEWHERE, Outcome.TRAINED]
    assert [config.seed for config in trained] == [1]
    assert "under way in another sweep: skipped" in capsys.readouterr().out


def test_a_run_is_claimed_while_it_trains_and_no_longer(configs, tmp_path, monkeypatch):
    [planned, _], held = planned_runs(configs("--seeds", "2")), []

    def recording_claim(log_dir, key):
        class Claim:
            def __enter__(self):
                held.append(key)
                return True

            def __exit__(self, *_):
                held.remove(key)

        return Claim()

    def train(config: Config) -> None:
        assert held == [planned.key]
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "claim", recording_claim)
    with pytest.raises(KeyboardInterrupt):
        make_run(planned, train)
    assert held == []


def test_what_another_sweep_finished_meanwhile_is_not_trained_again(configs):
    """The plan was made before: a run is looked for once it is claimed."""
    one, _ = planned_runs(configs("--seeds", "2"))
    write_run(one)
    assert make_run(one, never) is Outcome.PRESENT


def test_a_worker_that_would_train_otherwise_trains_nothing(configs):
    """Of a cluster, where files or packages may differ from those of the sweep."""
    planned = planned_runs(configs("--seeds", "2"))[0]
    other = dataclasses.replace(planned, procedure=planned.procedure | {"augmentation": "another"})
    with pytest.raises(UserError, match="the augmentation of this process is not that of the sweep"):
        make_claimed_run(other, never)


def test_a_diverged_run_is_named_and_not_resumed(configs, capsys):
    plan = planned_runs(configs("--seeds", "2"))
    folder = write_run(plan[0], RunState.DIVERGED)

    def train(config: Config) -> Path:
        raise Diverged("the loss became nan")

    assert make_runs_here(plan, train) == [Outcome.DIVERGED, Outcome.DIVERGED]
    out = capsys.readouterr().out
    assert f"diverged: {folder.name}" in out
    assert "diverged: the loss became nan" in out


def test_a_run_that_trains_outside_of_a_sweep_is_skipped(configs, monkeypatch, capsys):
    [one, _] = planned_runs(configs("--seeds", "2"))
    folder = write_run(one, RunState.UNFINISHED)
    monkeypatch.setattr(sweep_module, "lock_file", lambda path: None if path == folder / LOCK else lock_file(path))
    assert make_run(one, never) is Outcome.ELSEWHERE
    assert folder.name in capsys.readouterr().out


# ---------------------------------------------------------------- the whole program

def test_a_sweep_makes_its_runs_and_compares_them(sweep, run, tmp_path):
    status, out, err = sweep("--epochs", "1", "--lr", "0.01,0.05", "--seeds", "2")
    assert (status, err) == (0, "")
    folders = find_runs(tmp_path / "logs")
    assert sorted((read_run(f).record["config"]["lr"], read_run(f).record["config"]["seed"]) for f in folders) == [
        (0.01, 0), (0.01, 1), (0.05, 0), (0.05, 1)]
    assert "Run 4 of 4: lr 0.05, seed 1\n" in out
    assert "4 of 4 runs are finished" in out
    assert "Differences are in points of test accuracy" in " ".join(out.split())
    assert (tmp_path / "logs" / "experiments.csv").exists()
    assert (tmp_path / "logs" / "experiments.png").stat().st_size > 10_000
    assert not (tmp_path / "logs" / "experiments.md").exists()
    assert run("--epochs", "1", "--lr", "0.05", "--seed", "1")[0] == 0  # the same code path as a single run
    single = find_runs(tmp_path / "logs")[0]
    assert weights_of(single) == weights_of(folders[0])
    assert figures(single) == figures(folders[0])


def test_a_sweep_removes_old_claims(sweep, tmp_path):
    claims = tmp_path / "logs" / "runs" / ".claims"
    claims.mkdir(parents=True)
    (claims / "old.lock").touch()
    os.utime(claims / "old.lock", (time.time() - 2 * DAY,) * 2)
    assert sweep("--epochs", "1", "--seeds", "2")[0] == 0
    assert not (claims / "old.lock").exists()


def test_a_sweep_goes_on_where_it_was_interrupted(sweep, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 3, raising(KeyboardInterrupt()))
    arguments = ("--epochs", "2", "--lr", "0.01,0.05,0.1")
    status, _, err = sweep(*arguments)
    assert status == 130
    assert "or repeat the sweep, which skips what is finished" in one_line(err)
    assert len(find_runs(tmp_path / "logs")) == 2
    status, out, _ = sweep(*arguments)
    assert status == 0
    assert out.count("already finished: ") == 1
    folders = find_runs(tmp_path / "logs")
    assert len(folders) == 3
    assert all(len(read_run(folder).rows) == 2 for folder in folders)
    status, out, _ = sweep(*arguments)
    assert out.count("already finished: ") == 3
    assert len(find_runs(tmp_path / "logs")) == 3


def test_an_edited_augmentation_is_another_run(sweep, tmp_path, monkeypatch):
    assert sweep("--epochs", "1", "--seeds", "2")[0] == 0
    train_policy = making.train_policy
    monkeypatch.setattr(making, "train_policy", lambda *given: A.Compose(train_policy(*given).transforms[::-1]))
    status, out, _ = sweep("--epochs", "1", "--seeds", "2")
    assert status == 0
    assert len(find_runs(tmp_path / "logs")) == 4
    assert re.search(r"^augmentation [0-9a-f]{8}  +2 ", out, re.MULTILINE)


def test_another_network_or_other_images_are_other_runs(sweep, tmp_path, monkeypatch):
    for more, runs in (([], 2), (["--validation", "9"], 4)):
        assert sweep("--epochs", "1", "--seeds", "2", *more)[0] == 0
        assert len(find_runs(tmp_path / "logs")) == runs
    import main

    class Edited(Net):
        def forward(self, images):
            return 2 * super().forward(images)

    for module in (main, sweep_module):
        monkeypatch.setattr(module, "Net", Edited)
    status, out, _ = sweep("--epochs", "1", "--seeds", "2")
    assert status == 0
    assert len(find_runs(tmp_path / "logs")) == 6
    assert sum(line.split()[:1] == ["network"] or ", network " in line for line in out.splitlines()) >= 1


def test_a_run_that_diverges_does_not_end_the_sweep(sweep, tmp_path):
    arguments = ("--epochs", "3", "--lr", "1000,0.01", "--weight-decay", "10")
    for said in ("diverged: the loss became", "diverged: "):
        status, out, _ = sweep(*arguments)
        assert status == 0
        assert said in out
        assert "1 of 2 runs are finished\n1 diverged (lr 1000.0, seed 0)\n" in out
        assert len(find_runs(tmp_path / "logs")) == 2  # and the second time none is resumed
    assert out.count("left out: ") == 1
    assert "resumed" not in out


def test_a_run_elsewhere_is_told_at_the_end(sweep, configs, monkeypatch):
    from tinycnn.experiments import claims

    monkeypatch.setattr(claims, "lock_file", lambda path: None)
    status, out, _ = sweep("--epochs", "1", "--seeds", "2")
    assert status == 0
    assert "0 of 2 runs are finished\n2 under way elsewhere (seed 0; seed 1); repeat the sweep when they have ended" in out


def test_two_sweeps_at_once_train_no_run_twice(sweep, pictures, tmp_path):
    """The first one waits in the training of its first run until the second one has ended."""
    ended = tmp_path / "ended"
    wait = (f"import pathlib, time\ntrain_epoch = main.train_epoch\ndef waiting(*arguments):\n"
            f"    while not pathlib.Path({str(ended)!r}).exists():\n        time.sleep(0.05)\n"
            "    return train_epoch(*arguments)\nmain.train_epoch = waiting")
    arguments = ("--epochs", "1", "--seeds", "2")
    first = start_program("sweep", "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"),
                          *SMALL, *arguments, before=wait)
    while not find_runs(tmp_path / "logs"):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    status, out, _ = sweep(*arguments)
    ended.touch()
    first_out, first_err = first.communicate(timeout=100)
    assert (status, first.returncode) == (0, 0), first_err
    assert "Run 1 of 2: seed 0\nunder way in another sweep: skipped" in out
    assert "1 of 2 runs are finished\n1 under way elsewhere (seed 0)" in out
    assert "Run 2 of 2: seed 1\nalready finished: " in first_out
    assert "2 of 2 runs are finished" in first_out
    assert sorted(read_run(folder).record["config"]["seed"] for folder in find_runs(tmp_path / "logs")) == [0, 1]


def test_a_demonstration_can_be_swept_and_repeated(command, tmp_path, monkeypatch):
    import main
    from tinycnn.data import loading
    from tinycnn.data.dataset import Split

    whole = synthetic()
    train, test = (Split(split.images[:32], split.labels[:32]) for split in (whole.train, whole.test))
    few = dataclasses.replace(whole, train=train, test=test)
    monkeypatch.setattr(sweep_module, "load_images", lambda *_: few)
    monkeypatch.setattr(main, "load_images", never)  # the runs share the images of the plan
    monkeypatch.setattr(loading, "DEMONSTRATION_EPOCHS", 2)
    for finished in (0, 2):
        status, out, _ = command("sweep", "--seeds", "2", "--log-dir", tmp_path, *SMALL)
        assert status == 0
        assert out.count("already finished: ") == finished
    assert len(read_run(find_runs(tmp_path)[0]).rows) == 2 < Config().epochs
