"""The command line, without running it."""

import dataclasses
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from config import RECIPES, SETTINGS, Config, UserError, did_you_mean, setting
from tinycnn.commands import parser
from tinycnn.commands.parser import parse


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name, field in SETTINGS.items():
        assert "--" + name.replace("_", "-") in out
        assert f"(default: {field.default!r})" in out


def test_help_and_errors_load_nothing_slow():
    """In one process: each command's help, and wrong lines. What takes long, torch, NumPy, Matplotlib, isn't loaded by them."""
    code = """if True:
        import contextlib, io, sys
        from config import UserError
        from tinycnn.commands import parser
        for line in (["--help"], ["--wrong"], ["--epochs", "0"], ["fly"], *([verb, "--help"] for verb in parser.VERBS)):
            with contextlib.suppress(UserError, SystemExit), contextlib.redirect_stdout(io.StringIO()):
                parser.parse(line)
                sys.exit(f"{line} is right")
        sys.exit(str(sorted({"torch", "numpy", "matplotlib", "importlib.metadata"} & set(sys.modules))))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_a_setting_of_a_recipe_yields_to_a_flag(monkeypatch):
    monkeypatch.setitem(RECIPES, "quick", {"epochs": 20, "lr": 0.1})
    arguments = parse(["--recipe", "quick", "--lr", "0.2", "--nesterov"])
    assert arguments.given == {"epochs": 20, "lr": 0.2, "nesterov": True}
    assert arguments.config == Config(epochs=20, lr=0.2, nesterov=True)
    assert parse(["train", "--lr", "0.2"]).config == Config(lr=0.2)


def test_a_mistake_in_a_recipe_is_named(monkeypatch):
    monkeypatch.setitem(RECIPES, "quick", {"epoch": 20})
    with pytest.raises(UserError, match=r"recipe quick in config\.py has the setting 'epoch'.* did you mean epochs\?"):
        parse(["--recipe", "quick"])


@pytest.mark.parametrize("line", [["--epochs", "1"], ["compare"]])
def test_a_wrong_default_is_named_before_anything_is_done(monkeypatch, line):
    monkeypatch.setitem(Config.__init__.__kwdefaults__, "epochs", 80.0)
    with pytest.raises(UserError, match=r"the defaults in config\.py: --epochs is 80\.0, but must be of type int"):
        parse(line)


@pytest.mark.parametrize("field", [
    dataclasses.field(default=(1, 2), metadata=SETTINGS["seed"].metadata), dataclasses.field(default=3)])
def test_a_setting_that_no_record_can_hold_is_named(monkeypatch, field):
    field.name, field.type = "steps", type(field.default)
    monkeypatch.setitem(SETTINGS, "steps", field)
    with pytest.raises(UserError, match=r"the defaults in config\.py: steps must be declared as steps: TYPE = setting"):
        parse(["--epochs", "1"])


@pytest.mark.parametrize("line", [[], ["--resume"], ["compare"], ["plot"], ["test"], ["predict", "x.png"], ["export"],
                                  ["sweep", "--seeds", "2"]], ids=str)
def test_a_home_folder_is_found_also_where_the_shell_leaves_its_sign(line):
    arguments = vars(parse([*line, "--log-dir=~/logs"]))
    assert arguments.get("given", arguments)["log_dir"] == os.path.expanduser("~/logs")
    assert setting("~/data", "images").default == os.path.expanduser("~/data")


def test_a_named_data_dir_makes_cifar10_of_auto_only(monkeypatch):
    assert parse(["--data-dir", Config.data_dir]).config.dataset == "cifar10"
    monkeypatch.setattr(Config, "dataset", "folder")  # as an edited config.py has it
    assert parse(["--data-dir", Config.data_dir]).config.dataset != "cifar10"


@pytest.mark.parametrize("verb", ["test", "plot", "export"])
def test_the_help_tells_where_the_images_of_a_run_are_looked_for(verb, capsys):
    with pytest.raises(SystemExit):
        parse([verb, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "train/<class>/* and test/<class>/* (default: where the run had its images)" in out


@pytest.mark.parametrize(("line", "words"), [
    (["tset"], "there is no command 'tset': did you mean test?"), (["compare", "--log-dri", "x"], "did you mean --log-dir?"),
    (["sweep"], "nothing varies in this sweep"), (["sweep", "--lr", "0.1"], "nothing varies in this sweep"),
    (["sweep", "--seeds", "0"], "--seeds is 0"), (["sweep", "--lr", "0.1,0.1"], "has a value twice"),
    (["sweep", "--epochs", "1,x"], "must be ints"), (["sweep", "--nesterov", "yes"], "must be true or false"),
    (["--epochs", "9" * 400], "must lie in 1 to"),
    (["--seed", "9" * 400], "must lie in 0 to"), (["--name", "a+b"], "must not contain +"),
    (["sweep", "--seeds", "2", "--name", "a+b"], "must not contain +"),
    (["export", "--to", "onx"], "invalid choice: 'onx'"), (["predict", "x.png", "--top", "0"], "--top is 0"),
    (["predict"], "required: IMAGE"), (["test", "--device", "gpu"], "--device is 'gpu'"),
    (["--nesterov=true"], "--nesterov/--no-nesterov: takes no value"),
    (["--nesterov", "true"], "a switch takes no value: write --nesterov or --no-nesterov"),
    (["--lr", "0,01"], "'0,01' is no number: write a decimal point"), (["--epochs", "1.5"], "'1.5' is no whole number"),
    (["--epochs", "5", "predict", "cat.jpg"], "put the command first: python main.py predict"),
    (["--learning-rate", "0.1"], "unknown argument --learning-rate: here it is --lr ("),
    (["--Batch_Size=3"], "did you mean --batch-size?"), (["--optimizer", "adamw"], "here it is SGD; another one is an edit")])
def test_wrong_lines_are_named(line, words):
    with pytest.raises(UserError) as error:
        parse(line)
    assert words in str(error.value)


def test_an_unlike_flag_is_not_suggested():
    assert did_you_mean("--optimizer", ["--crop-size", "--min-lr"]) == ""


def test_hints_name_flags_that_there_are():
    flags = {words.split()[0] for words in parser.HERE_IT_IS.values() if words.startswith("-")}
    assert flags - {"--schedule"} <= {"--" + name.replace("_", "-") for name in SETTINGS}


def test_a_plus_joins_teachers_in_a_sweep():
    assert [config.teacher for config in parse(["sweep", "--teacher", ",A,A+B"]).configs] == ["", "A", "A,B"]


def test_a_sweep_is_all_combinations_with_the_first_seed_then_the_next():
    configs = parse(["sweep", "--lr", "0.1,0.2", "--nesterov", "false,true", "--seeds", "2", "--epochs", "3"]).configs
    assert [(c.seed, c.lr, c.nesterov) for c in configs] == [
        (seed, lr, nesterov) for seed in (0, 1) for lr in (0.1, 0.2) for nesterov in (False, True)]
    assert {c.epochs for c in configs} == {3}


def test_a_flag_without_values_means_true_in_a_sweep_too():
    assert {config.nesterov for config in parse(["sweep", "--nesterov", "--seeds", "2"]).configs} == {True}
    assert {config.nesterov for config in parse(["sweep", "--nesterov", "--lr", "0.1,0.2"]).configs} == {True}


def test_one_at_a_time_varies_each_setting_alone():
    configs = parse(["sweep", "--one-at-a-time", "--lr", "0.1,0.01", "--dropout", "0,0.2"]).configs
    assert configs == [Config(), Config(lr=0.1), Config(dropout=0.2)]


def test_more_threads_than_cores_are_told(capsys, monkeypatch):
    monkeypatch.setattr(parser, "available_cores", lambda: 2)
    parse(["--threads", "3"])
    assert "--threads is 3, but this program may use 2 cores" in capsys.readouterr().err


def test_defaults_of_export():
    arguments = parse(["export"])
    assert (arguments.to, arguments.run, arguments.log_dir) == ("onnx", None, Config.log_dir)
    assert arguments.data_dir is None  # where the run had its images


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        parse(["--version"])
    assert capsys.readouterr().out.startswith("tiny-cifar10-cnn 1")


def test_an_earlier_name_of_a_setting_is_a_flag_too():
    assert parse(["--uncropped-share", "0.2"]).config.whole_images_share == 0.2
    assert parse(["sweep", "--uncropped-share", "0,0.2"]).configs[1].whole_images_share == 0.2
