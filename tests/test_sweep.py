"""python main.py sweep: which runs it asks for, in which order, and that it makes each once."""

import dataclasses

import pytest
from conftest import SMALL, at_epoch, one_line, raising
from test_program import figures, weights_of

import main
from config import UserError
from training.commands import parse_sweep
from training.records import find_runs, read_run


@pytest.fixture
def sweep(pictures, tmp_path, capsys):
    """sweep("--lr", "0.1,0.2"): main.py sweep on the small folder -> (status, stdout, stderr); logs in tmp_path/logs."""
    def sweep(*arguments: str):
        status = main.main(["sweep", "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"),
                            *SMALL, *arguments])
        return status, *capsys.readouterr()

    return sweep


def test_a_grid_is_all_combinations_seed_by_seed():
    configs = parse_sweep(["--lr", "0.01,0.05", "--nesterov", "false,true", "--seeds", "2", "--epochs", "8"])
    assert [(c.seed, c.lr, c.nesterov) for c in configs] == [
        (seed, lr, nesterov) for seed in (0, 1) for lr in (0.01, 0.05) for nesterov in (False, True)]
    assert {c.epochs for c in configs} == {8}


def test_one_at_a_time_varies_each_setting_alone_around_the_defaults():
    configs = parse_sweep(["--one-at-a-time", "--flip-p", "0.5,0", "--lr", "0.05,0.1", "--epochs", "8", "--seeds", "2"])
    assert [(c.seed, c.flip_p, c.lr) for c in configs] == [
        (seed, *values) for seed in (0, 1) for values in ((0.5, 0.01), (0, 0.01), (0.5, 0.05), (0.5, 0.1))]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lr", "0.1,fast"], "'0.1,fast' must be floats, with commas between"),
    (["--nesterov", "maybe"], "'maybe' must be true or false"),
    (["--lr", "0.1,0.1"], "lr has a value twice"),
    (["--lr", "0.1,-1"], "lr is -1.0, but must lie in"),
    (["--epochs", "8,"], "'8,' must be ints"),
    (["--seeds", "0"], "seeds is 0, but must lie in 1 to 1000"),
    (["--seed", "1"], "unrecognized arguments: --seed 1"),
    (["--speed", "1"], "unrecognized arguments")])
def test_what_makes_no_sweep_is_refused_before_it_begins(arguments, words, capsys):
    with pytest.raises(UserError, match=words):
        parse_sweep(arguments)
    assert main.main(["sweep", *arguments]) == 2
    assert words in one_line(capsys.readouterr().err)


def test_a_sweep_makes_its_runs_and_compares_them(sweep, run, tmp_path):
    status, out, err = sweep("--epochs", "1", "--lr", "0.01,0.05", "--seeds", "2")
    assert (status, err) == (0, "")
    folders = find_runs(tmp_path / "logs")
    assert sorted((read_run(f).record["config"]["lr"], read_run(f).record["config"]["seed"]) for f in folders) == [
        (0.01, 0), (0.01, 1), (0.05, 0), (0.05, 1)]
    assert "Run 4 of 4" in out
    assert "Holm's correction for 1 comparisons" in out
    assert (tmp_path / "logs" / "experiments.csv").exists()
    assert run("--epochs", "1", "--lr", "0.05", "--seed", "1")[0] == 0  # the same code path as a single run
    single = find_runs(tmp_path / "logs")[0]
    assert weights_of(single) == weights_of(folders[0])
    assert figures(single) == figures(folders[0])


def test_a_sweep_goes_on_where_it_was_interrupted(sweep, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 3, raising(KeyboardInterrupt()))
    arguments = ("--epochs", "2", "--lr", "0.01,0.05,0.1")
    status, _, err = sweep(*arguments)
    assert status == 130
    assert "or repeat the sweep, which skips what is finished" in one_line(err)
    assert len(find_runs(tmp_path / "logs")) == 2
    status, out, _ = sweep(*arguments)
    assert status == 0
    assert out.count("is finished: ") == 1
    folders = find_runs(tmp_path / "logs")
    assert len(folders) == 3
    assert all(len(read_run(folder).rows) == 2 for folder in folders)
    status, out, _ = sweep(*arguments)
    assert out.count("is finished: ") == 3
    assert len(find_runs(tmp_path / "logs")) == 3


def test_another_network_or_other_images_are_other_runs(sweep, tmp_path, monkeypatch):
    from training import sweep as module

    assert sweep("--epochs", "1")[0] == 0
    assert sweep("--epochs", "1", "--validation", "9")[0] == 0
    assert len(find_runs(tmp_path / "logs")) == 2
    other = tmp_path / "model.py"
    other.write_text("another network")
    monkeypatch.setattr(module, "MODEL", other)
    assert sweep("--epochs", "1")[0] == 0
    assert len(find_runs(tmp_path / "logs")) == 3


def test_a_run_that_diverges_does_not_end_the_sweep(sweep, tmp_path):
    status, out, _ = sweep("--epochs", "3", "--lr", "1000,0.01", "--weight-decay", "10")
    assert status == 0
    assert "ended early: the loss became" in out
    assert sum((folder / "summary.json").exists() for folder in find_runs(tmp_path / "logs")) == 1


def test_a_demonstration_can_be_swept_and_repeated(tmp_path, capsys, monkeypatch):
    import training.images
    import training.parts
    from config import Config

    whole = training.images.synthetic()
    train, test = (training.images.Split(split.images[:64], split.labels[:64]) for split in (whole.train, whole.test))
    few = dataclasses.replace(whole, train=train, test=test)
    monkeypatch.setattr(training.images, "load", lambda *_: few)
    monkeypatch.setattr(training.parts, "load", lambda *_: few)
    for finished in (0, 1):
        assert main.main(["sweep", "--log-dir", str(tmp_path), "--data-dir", str(tmp_path / "none"), *SMALL]) == 0
        assert capsys.readouterr().out.count("is finished") == finished
    assert len(read_run(find_runs(tmp_path)[0]).rows) == training.parts.DEMONSTRATION_EPOCHS < Config().epochs
