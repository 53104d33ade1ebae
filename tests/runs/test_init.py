"""Runs that begin with trained weights: --init."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, SMALL, at_epoch, figures, one_line, raising, start_program, weights_of

import main
from config import UserError
from model import Net
from tinycnn.commands.parser import parse
from tinycnn.experiments.differences import differences
from tinycnn.experiments.sweep import plan_runs
from tinycnn.inference.result import train_and_show
from tinycnn.runs.finding import find_runs
from tinycnn.runs.record import read_record
from tinycnn.runs.weights import begin_with, describe_init, load_weights, read_weights

BEST = "logs/reference/best/seed-0"
TRAINED = read_weights(Path(REFERENCE, "best/seed-0/final.safetensors"))


def test_all_that_fits_is_copied_and_a_head_for_other_classes_begins_anew():
    torch.manual_seed(1)
    net, before = Net(3), torch.random.get_rng_state()
    head = {name: tensor.clone() for name, tensor in net.head.state_dict(prefix="head.").items()}
    begin_with(net, TRAINED)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, head.get(name, TRAINED.tensors[name])), name
    assert describe_init(net, TRAINED, 3) == (
        f"init: {TRAINED.name}, head.1.weight and head.1.bias begin anew: 3 classes, not 10")
    assert describe_init(Net(), TRAINED, 10) == f"init: {TRAINED.name}, all of it"
    assert describe_init(Net(10, 0.1), TRAINED, 10).endswith("head.2.weight and head.2.bias begin anew")  # after the dropout
    begin_with(net, None)


def test_a_network_of_another_width_has_nothing_in_common():
    """But for the head's bias and BatchNorm's counts."""
    with pytest.raises(UserError, match=r"^--init: no layer of .* fits this network: name weights of the same --width"):
        begin_with(Net(10, width=2), TRAINED)


def test_a_run_begins_with_a_committed_network_of_other_classes(run, tmp_path, monkeypatch):
    beginnings, train_epoch = [], main.train_epoch

    def train(step, net, *rest):
        beginnings.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return train_epoch(step, net, *rest)

    monkeypatch.setattr(main, "train_epoch", train)
    status, out, err = run("--epochs", "1", "--init", BEST)
    assert (status, err) == (0, "")
    [folder] = find_runs(tmp_path / "logs")
    note = f"init: {TRAINED.name}, head.1.weight and head.1.bias begin anew: 3 classes, not 10"
    record = read_record(folder)
    assert record["notes"][0] == note
    assert f"# {note}\n" in (folder / "model_accuracy.log").read_text()
    assert note in " ".join(out.split())
    assert record["config"]["init"] == TRAINED.name
    assert torch.equal(beginnings[0]["input_block.0.weight"], TRAINED.tensors["input_block.0.weight"])
    status, _, err = run("--epochs", "1", "--init", folder / "final.safetensors", "--lr", "0.02", "--name", "on")
    assert (status, err) == (0, "")  # on top of it
    on = read_record(find_runs(tmp_path / "logs")[0])
    assert on["notes"][0] == f"init: {read_weights(folder / 'final.safetensors').name}, all of it"
    assert differences(on, record)["init"].startswith(folder.name)
    assert run("--epochs", "1", "--init", folder.name, "--teacher", "on")[0] == 0  # beside a teacher, or for one


@pytest.fixture
def begun(run, tmp_path):
    """begun("--name", "x"): (status, stderr, folder) of a run of three epochs that begins with the weights in tmp_path."""
    shutil.copy(TRAINED.path, tmp_path / "begin.safetensors")

    def begun(*arguments: str):
        status, _, err = run("--epochs", "3", "--dropout", "0.2", "--init", tmp_path / "begin.safetensors", *arguments)
        return status, err, find_runs(tmp_path / "logs")[0]

    return begun


def test_a_resumed_run_is_exact_without_the_file_and_refuses_another(run, tmp_path, begun, monkeypatch):
    whole = begun()[2]
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        status, _, folder = begun()
    assert (status, folder != whole) == (130, True)
    status, _, err = run("--resume", folder.name, "--init", whole.name)
    assert status == 2
    assert f"--init {whole.name} is not what run {folder.name} began with: leave --init out" in one_line(err)
    shutil.copytree(tmp_path / "logs", tmp_path / "copy")
    (tmp_path / "begin.safetensors").rename(tmp_path / "renamed.safetensors")
    for line in ((), ("--init", str(tmp_path / "renamed.safetensors"))):  # the same, by another name
        shutil.rmtree(tmp_path / "logs")
        shutil.copytree(tmp_path / "copy", tmp_path / "logs")
        assert run("--resume", folder.name, *line)[0] == 0
        assert weights_of(folder) == weights_of(whole)
        assert figures(folder) == figures(whole)
        assert read_record(folder)["config"] == read_record(whole)["config"]
        assert [note for note in read_record(folder)["notes"] if note.startswith("init")] == read_record(whole)["notes"][:1]


def test_a_run_without_an_init_resumes_with_none(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        assert run("--epochs", "2")[0] == 130
    status, _, err = run("--resume", "--init", BEST)
    assert status == 2
    assert "is not what run" in one_line(err)


def test_kill_9(run, pictures, tmp_path, begun):
    whole = begun()[2]
    process = start_program(
        "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "killed"), *SMALL, "--epochs", "3",
        "--dropout", "0.2", "--init", str(tmp_path / "begin.safetensors"), interval=0.0,
        before="train_epoch, calls = main.train_epoch, iter(range(9))\n"
        "main.train_epoch = lambda *given: train_epoch(*given) if next(calls) < 2 else "
        f"__import__('os').kill(__import__('os').getpid(), {int(signal.SIGKILL)})\n")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (tmp_path / "begin.safetensors").unlink()
    assert run("--resume", "--log-dir", tmp_path / "killed")[0] == 0
    [folder] = find_runs(tmp_path / "killed")
    assert weights_of(folder) == weights_of(whole)
    assert figures(folder) == figures(whole)


def test_to_train_on_begin_a_new_run(run, begun, monkeypatch):
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        folder = begun()[2]
    status, _, err = run("--resume", "--epochs", "5")
    assert status == 2
    assert f"run {folder.name} has 3, and the end of a schedule is fixed when a run begins: leave --epochs out" in one_line(err)
    assert f"train on with a new run, --init {folder.name}" in err
    assert run("--resume")[0] == 0
    _, _, err = run("--resume", folder.name, "--epochs", "5")
    assert f"to train on, start a new run with --init {folder.name}" in one_line(err)
    assert run("--init", folder.name, "--epochs", "1", "--dropout", "0.2")[0] == 0


@pytest.mark.parametrize(("arguments", "said"), [
    (("--init", "nobody"), "--init: there is no run 'nobody'"),
    (("--init", "nobody.safetensors"), "--init: there is no file nobody.safetensors"),
    (("--init", f"{BEST},{BEST}"), f"--init is '{BEST},{BEST}': a run begins with the weights of one, so name one"),
    (("--init", BEST, "--width", "2"), "fits this network: name weights of the same --width and model.py"),
])
def test_a_wrong_init_is_named_and_leaves_no_run(run, tmp_path, arguments, said):
    status, _, err = run(*arguments)
    assert status == 2
    assert said in one_line(err)
    assert not find_runs(tmp_path / "logs")


def test_held_out_images_must_not_have_been_seen(run, tmp_path):
    assert run("--epochs", "1", "--validation", "6", "--name", "six")[0] == 0
    status, _, err = run("--epochs", "1", "--validation", "9", "--init", "six")
    assert status == 2
    assert "final.safetensors was trained on images that this run holds out" in one_line(err)
    for count in ("6", "3", "0"):  # the first three of the six
        assert run("--epochs", "1", "--validation", count, "--init", "six", "--name", count)[0] == 0


def test_it_counts_by_its_digest_in_a_sweep_and_in_compare(command, pictures, tmp_path, monkeypatch):
    """Whatever it is called; and the runs of a cluster need no file of it."""
    for name in ("one", "same"):
        shutil.copytree(REFERENCE / "best/seed-0", tmp_path / name)
    inits = ["", str(tmp_path / "one"), str(tmp_path / "same"), "logs/reference"]
    line = ["sweep", "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"), "--workers", "0",
            "--threads", "1", "--device", "cpu", "--no-pictures", "--epochs", "1", "--init", ",".join(inits)]
    plan, images = plan_runs(parse(line).configs)
    assert [planned.config.init for planned in plan] == [inits[0], inits[2], inits[3]]  # one and the same are one
    assert plan[1].record["config"]["init"] == f"same:{TRAINED.digest[:8]}"
    weights = load_weights(plan[1].config)
    shutil.rmtree(tmp_path / "same")
    monkeypatch.setattr("tinycnn.runs.inputs.load_weights", lambda *_: pytest.fail("a file was looked for"))
    train_and_show(main.train, plan[1].config, None, images, weights)
    monkeypatch.undo()
    status, out, _ = command(*line[:-1], str(tmp_path / "one"), "--seeds", "2")
    assert status == 0
    assert "already finished" in out
    assert f"init one:{TRAINED.digest[:8]}" in " ".join(out.split())  # one row of both, as they were called last
    assert len(find_runs(tmp_path / "logs")) == 2
