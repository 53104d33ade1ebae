"""main.py from its command line: what a user types, sees and finds."""

import json

import pandas
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    at_epoch,
    example_inputs,
    figures,
    one_line,
    only_run,
    raising,
    start_program,
    synthetic,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import load_file

import main
from config import Config
from model import Net
from tinycnn.data.dataset import Dataset, Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.folder import image_folder
from tinycnn.data.loading import load_dataset
from tinycnn.experiments import selection
from tinycnn.inference import result
from tinycnn.runs import inputs
from tinycnn.runs.finding import find_runs
from tinycnn.runs.log import read_log
from tinycnn.runs.record import read_run
from tinycnn.training.dilated import FastDilatedConv2d
from tinycnn.training.optimizer import SGD

# the learning rates that the design fixes, by epoch
RATES = {0: "0.010000", 10: "0.009619", 20: "0.008536", 30: "0.006914", 40: "0.005001", 50: "0.003087", 60: "0.001465",
         70: "0.000382", 79: "0.000005"}


def test_a_run_leaves_the_files_of_the_design(run, tmp_path, pictures):
    status, out, err = run("--epochs", "2", "--lr", "0.05", "--name", "first")
    assert (status, err) == (0, "")
    folder, logs = only_run(tmp_path), tmp_path / "logs"
    assert folder.name.endswith("-first")
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.json", "model_accuracy.log", "torch_summary.log", "checkpoint.pt", "checkpoint.previous.pt",
        "final.safetensors", "summary.json", "config.py", "augmentation.py", "model.py", "main.py"}
    for name in ("config.py", "augmentation.py", "model.py", "main.py"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    for name in ("model_accuracy.log", "torch_summary.log"):
        assert (logs / name).read_bytes() == (folder / name).read_bytes()
    for path in folder.glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes() or path.suffix == ".pt"
    found = read_run(folder)
    assert (found.record["config"]["epochs"], found.record["network"]["receptive_field"]) == (2, 79)
    assert found.record["dataset"]["class_names"] == ["disc", "ring", "square"]
    assert len(found.rows) == found.summary["epochs"] == 2
    assert found.summary["test_acc"] == pytest.approx(found.rows[-1]["test_acc"], abs=0.005)
    assert found.summary["seconds"] == pytest.approx(sum(row["seconds"] for row in found.rows), abs=0.02)
    assert pandas.read_csv(logs / "model_accuracy.log", sep=r"\s+", comment="#")["epoch"].tolist() == [0, 1]
    assert out.splitlines()[-2] == f"Everything is in {folder}"
    assert out.splitlines()[-1] == f"Next: python main.py test | predict IMAGE | export | compare, each with --log-dir {logs}"

    # the final weights load in three lines, and give the logged accuracy
    net = Net(num_classes=3)
    net.load_state_dict(load_file(folder / "final.safetensors"))
    net.eval()
    with safe_open(folder / "final.safetensors", "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    assert about["class_names"] == ["disc", "ring", "square"]
    assert about["config"]["lr"] == 0.05
    test = image_folder(pictures).test
    images = (torch.from_numpy(test.images) / 255 - torch.tensor(about["mean"])) / torch.tensor(about["standard_deviation"])
    right = (net(images.permute(0, 3, 1, 2).float()).argmax(1) == torch.from_numpy(test.labels)).float().mean()
    assert f"{100 * right:.2f}" == f"{found.rows[-1]['test_acc']:.2f}"


def test_one_config_gives_the_same_bytes_and_figures_whatever_the_workers(run, tmp_path):
    for workers in ("0", "2"):
        assert run("--epochs", "2", "--dropout", "0.3", "--batches", "workers", "--workers", workers)[0] == 0
    one, other = find_runs(tmp_path / "logs")
    assert weights_of(one) == weights_of(other)
    assert figures(one) == figures(other)


def test_the_learning_rates_of_the_baseline(run, tmp_path, monkeypatch):
    """All 80 epochs through the program, each cut short: the rates are the scheduler's, not the test's."""
    monkeypatch.setattr(main, "train_epoch", lambda step, *_: (step.args[1].step(), (1.0, 10.0))[1])
    monkeypatch.setattr(main, "test_epoch", lambda *_: (1.0, 10.0))
    assert run()[0] == 0
    lines = (only_run(tmp_path) / "model_accuracy.log").read_text().splitlines()
    logged = {int(line.split()[0]): line.split()[1] for line in lines if line[0] != "#" and "epoch" not in line}
    assert len(logged) == 80
    assert {epoch: logged[epoch] for epoch in RATES} == RATES


def test_with_validation_the_test_images_wait_for_the_end(run, tmp_path, monkeypatch):
    looked, test = [], DeviceBatches.test
    monkeypatch.setattr(DeviceBatches, "test", lambda self: (looked.append(1), test(self))[1])
    status, out, _ = run("--epochs", "2", "--validation", "9")
    assert (status, len(looked)) == (0, 1)
    rows = read_run(only_run(tmp_path)).rows
    assert f"Final accuracy: validation {rows[-1]['val_acc']:.2f} %, test {rows[-1]['test_acc']:.2f} %, train " in out
    assert [row["test_acc"] == row["test_acc"] for row in rows] == [False, True]
    assert all(0 <= row["val_acc"] <= 100 for row in rows)
    assert (only_run(tmp_path) / "best.safetensors").exists()
    assert read_run(only_run(tmp_path)).record["dataset"]["train"] == 39


def test_without_cifar10_auto_is_a_demonstration_with_a_banner(command, tmp_path, monkeypatch):
    real = synthetic()
    monkeypatch.setattr("tinycnn.data.loading.synthetic", lambda: Dataset(
        "synthetic", real.class_names, Split(real.train.images[:32], real.train.labels[:32]),
        Split(real.test.images[:16], real.test.labels[:16]), real.validation))
    monkeypatch.chdir(tmp_path)  # where there is no folder "data"
    line = ["--log-dir", tmp_path / "logs", *SMALL]
    status, out, err = command("--data-dir", Config.data_dir, *line)  # typed out, it must hold CIFAR-10
    assert status == 2
    assert "CIFAR-10 is not in data" in one_line(err)
    status, out, err = command(*line)
    assert status == 0
    assert "*  DEMONSTRATION on built-in drawn shapes" in out
    assert "could not be downloaded" in err
    for name in ("logs/model_accuracy.log", f"logs/runs/{only_run(tmp_path).name}/model_accuracy.log"):
        comments, rows = read_log(tmp_path / name)
        assert "DEMONSTRATION" in comments[1]
        assert len(rows) == 5


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lr", "nan"], "--lr is nan"), (["--batch-size", "0"], "--batch-size is 0"),
    (["--dataset", "foldr"], "--dataset is 'foldr', but must be one of auto, cifar10, folder, synthetic: did you mean folder?"),
    (["--device", "gpu"], "--device is 'gpu'"),
    (["--device", "cuda:999"], "there is no device cuda:999, as this PyTorch finds"),
    (["--data-dir", "/nowhere"], "there is no such folder"), (["--dataset", "cifar10", "--data-dir", "/nowhere"], "/nowhere"),
    (["--dataset", "auto", "--data-dir", "/nowhere"], "/nowhere"), (["--name", "x.safetensors"], "--name is 'x.safetensors'"),
    (["--validation", "100"], "--validation 100 takes 34 images of each class"), (["--data-dir", "x" * 300], "x" * 300),
    (["--teacher", "nobody"], "there is no run 'nobody'"), (["--warmup", "80"], "--warmup is 80"),
    (["--resume"], "there is no unfinished run"), (["--resume", "nothing"], "there is no run 'nothing'")])
def test_wrong_input_ends_with_one_line_status_2_and_no_files(run, tmp_path, arguments, words):
    status, out, err = run(*arguments)
    assert status == 2
    assert words in one_line(err)
    assert out == ""
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_where_there_is_none(run):
    status, _, err = run("--device", "cuda")
    assert status == 2
    assert "there is no device cuda, as this PyTorch finds 0 cuda devices: install a PyTorch that fits" in one_line(err)


def test_a_log_folder_that_can_not_be_one(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {}}')
    (tmp_path / "file").write_text("mine")
    for name, words in (("run", "is the folder of a run"), ("file", "runs can't be made (Not a directory): choose another")):
        status, _, err = run("--epochs", "1", "--log-dir", tmp_path / name)
        assert status == 2
        assert words in one_line(err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_system_without_locks_is_named_and_leaves_no_run(run, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: raising(OSError(37, "No locks available"))())
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "has no file locks (No locks available)" in one_line(err)
    assert find_runs(tmp_path / "logs") == []


def test_an_error_of_the_machine_is_one_line_and_a_bug_keeps_its_traceback(run, monkeypatch):
    at_epoch(monkeypatch, 0, raising(OSError(5, "Input/output error", "disk")))
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "Input/output error: 'disk'; no epoch is finished yet; resume with: " in one_line(err)
    at_epoch(monkeypatch, 0, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--epochs", "1")


def test_a_command_to_copy_keeps_its_spaces(command, pictures, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 0, raising(KeyboardInterrupt()))
    logs = tmp_path / "two  spaces"
    status, _, err = command("--dataset", "folder", "--data-dir", pictures, "--log-dir", logs, "--epochs", "1", *SMALL)
    assert status == 130
    assert f"resume with: python main.py --resume '{find_runs(logs)[0]}'\n" in one_line(err)
    assert command("--resume", find_runs(logs)[0])[0] == 0


def test_compare_without_the_reference_run_says_how_to_restore_it(command, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "REFERENCE", tmp_path / "gone")
    (tmp_path / "runs").mkdir()
    status, _, err = command("compare", "--log-dir", tmp_path)
    assert status == 2
    assert f"restore it with git -C {ROOT} checkout -- logs/reference" in one_line(err)


def test_training_has_the_settings(run, monkeypatch):
    threads, seeds, steps, determinism = [], [], [], []

    def look(step, *_):
        steps.append(step)
        threads.append(torch.get_num_threads())
        seeds.append(torch.initial_seed())
        return 1.0, 10.0

    monkeypatch.setattr(main, "train_epoch", look)
    monkeypatch.setattr("tinycnn.training.machine.set_determinism", lambda config: determinism.append(config.deterministic))
    assert run("--epochs", "2", "--momentum", "0.7", "--nesterov", "--weight-decay", "0.123", "--label-smoothing", "0.3",
               "--dropout", "0.4", "--width", "2", "--threads", "2", "--deterministic")[0] == 0
    net, optimizer, criterion = steps[0].args
    (group,) = optimizer.param_groups
    assert type(optimizer) is SGD
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["dampening"]) == (0.7, True, 0.123, 0)
    assert criterion.label_smoothing == 0.3
    assert sum(type(layer) is FastDilatedConv2d for layer in net.modules()) == 1
    assert [layer.p for layer in net.modules() if isinstance(layer, torch.nn.Dropout)] == [0.4]
    assert net.head[-1].in_channels == 512
    assert (threads, determinism) == ([2, 2], [True])
    assert seeds[0] != seeds[1]  # dropout draws other numbers in each epoch


def test_initialization_follows_the_seed_alone():
    first, other, with_dropout = (next(main.build(example_inputs(**settings))[0].parameters()) for settings in (
        {"seed": 0}, {"seed": 1}, {"seed": 0, "dropout": 0.3, "epochs": 3}))
    assert torch.equal(first, with_dropout)
    assert not torch.equal(first, other)


def test_a_diverging_loss_stops_the_run(run, tmp_path):
    status, _, err = run("--epochs", "5", "--lr", "1000", "--weight-decay", "10")
    assert status == 2
    assert "the loss became" in one_line(err)
    assert "lower --lr" in err
    assert "resuming would diverge again" in err
    assert not (only_run(tmp_path) / "summary.json").exists()
    status, _, err = run("--resume")
    assert status == 2
    assert "there is no unfinished run" in one_line(err)  # but what would diverge again


def test_weights_that_blow_up_in_the_last_step_are_no_result(run, tmp_path, monkeypatch):
    """The training figures were still finite; the test shows it."""
    train_epoch = main.train_epoch

    def last_step(step, net, *others):
        figures = train_epoch(step, net, *others)
        next(net.parameters()).data.fill_(torch.nan)
        return figures

    monkeypatch.setattr(main, "train_epoch", last_step)
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "the loss became nan" in one_line(err)
    assert "no epoch is finished yet" in err
    assert not (only_run(tmp_path) / "final.safetensors").exists()


def test_into_a_pipe_an_epoch_is_a_line_and_no_slow_import_is_made(pictures, tmp_path):
    process = start_program("--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path), "--epochs", "2",
                            *SMALL, "--batches", "workers", "--workers", "1", before="import atexit, urllib.request\n"
                            "urllib.request.OpenerDirector.open = lambda *_, **__: print('phoned home')\n"
                            "atexit.register(lambda: print(*sys.modules))")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line[:5].strip().isdigit()]
    assert [row[0] for row in rows] == ["0", "1"]
    assert "\r" not in out
    assert "phoned home" not in out
    modules = out.splitlines()[-1].split()
    assert "torch.optim" in modules
    assert {"torch._dynamo", "torchvision"}.isdisjoint(modules)  # as slow as torch itself; torchvision imports it


def test_the_real_cifar10_trains(cifar10, command, tmp_path, monkeypatch):
    """Two thousand real images for two epochs: the whole path, with the official batches."""
    whole = load_dataset("cifar10", str(cifar10))
    part = Dataset("cifar10", whole.class_names, Split(whole.train.images[:2000], whole.train.labels[:2000]),
                  Split(whole.test.images[:500], whole.test.labels[:500]), whole.validation)
    monkeypatch.setattr(inputs, "load_dataset", lambda *_: part)
    assert command("--dataset", "cifar10", "--epochs", "2", "--batch-size", "32", "--workers", "0", "--device", "cpu",
                   "--log-dir", tmp_path / "logs", "--no-pictures")[0] == 0
    assert read_run(only_run(tmp_path)).rows[-1]["train_acc"] > 20  # chance is 10


def test_a_run_ends_with_where_it_stands_beside_the_reference_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "train_epoch", lambda *_: (1.0, 30.0))
    monkeypatch.setattr(main, "test_epoch", lambda *_: (1.0, 40.0))
    assert "reference" not in run("--epochs", "1")[1]  # which is on other images
    monkeypatch.setattr(result, "REFERENCE", only_run(tmp_path))
    monkeypatch.setattr(main, "test_epoch", lambda *_: (1.0, 55.5))
    out = run("--epochs", "1", "--seed", "1")[1]
    assert "That is +15.50 percentage points from the reference run, 40.00 %\n" in out
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    monkeypatch.setattr(result, "REFERENCE", tmp_path / "damaged")
    assert run("--epochs", "1")[0] == 0
