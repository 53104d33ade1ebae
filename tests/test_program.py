"""main.py from its command line: what a user types, sees and finds."""

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from conftest import ROOT, SMALL, at_epoch, edit, figures, one_line, only_run, raising, start_program, synthetic, weights_of
from safetensors import safe_open
from safetensors.torch import load_file

import main
from config import Config
from model import Net
from tinycnn.commands import compare
from tinycnn.data.dataset import Images, Split
from tinycnn.data.folder import image_folder
from tinycnn.data.loading import load_images
from tinycnn.runs.finding import find_runs
from tinycnn.runs.log import read_log
from tinycnn.runs.record import read_run
from tinycnn.training.dilated import FastDilatedConv2d
from tinycnn.training.metrics import Result
from tinycnn.training.optimizer import SGD

# the learning rates that the design fixes, by epoch
RATES = {0: "0.010000", 10: "0.009619", 20: "0.008536", 30: "0.006914", 40: "0.005001", 50: "0.003087", 60: "0.001465",
         70: "0.000382", 79: "0.000005"}


def test_a_run_leaves_the_files_of_the_design(run, tmp_path):
    status, out, err = run("--epochs", "2", "--name", "first")
    assert (status, err) == (0, "")
    folder = only_run(tmp_path)
    assert folder.name.endswith("-first")
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.json", "model_accuracy.log", "torch_summary.log", "checkpoint.pt", "checkpoint.previous.pt",
        "final.safetensors", "summary.json", "model.py"}
    found = read_run(folder)
    assert found.record["config"]["epochs"] == 2
    assert found.record["network"]["receptive_field"] == 79
    assert found.record["dataset"]["class_names"] == ["disc", "ring", "square"]
    assert len(found.rows) == found.summary["epochs"] == 2
    assert found.summary["test_acc"] == pytest.approx(found.rows[-1]["test_acc"], abs=0.005)
    for name in ("model_accuracy.log", "torch_summary.log"):
        assert (tmp_path / "logs" / name).read_bytes() == (folder / name).read_bytes()
    frame = pandas.read_csv(tmp_path / "logs" / "model_accuracy.log", sep=r"\s+", comment="#")
    assert frame["epoch"].tolist() == [0, 1]
    for path in folder.glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes() or path.suffix == ".pt"
    assert out.splitlines()[-2] == f"Everything is in {folder}"
    assert out.splitlines()[-1].startswith("Next: python main.py test")


def test_the_final_weights_load_in_three_lines_and_give_the_logged_accuracy(run, tmp_path, pictures):
    run("--epochs", "3", "--lr", "0.05")
    folder = only_run(tmp_path)
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
    assert f"{100 * right:.2f}" == f"{read_run(folder).rows[-1]['test_acc']:.2f}"


@pytest.mark.parametrize("batches", ["workers", "device"])
def test_one_config_gives_the_same_bytes_and_figures_whatever_the_workers(run, tmp_path, batches):
    config = ("--epochs", "2", "--dropout", "0.3", "--batches", batches)
    for workers in ("0", "0", "4"):
        assert run(*config, "--workers", workers)[0] == 0
    folders = find_runs(tmp_path / "logs")
    assert len({weights_of(folder) for folder in folders}) == 1
    assert len({figures(folder) for folder in folders}) == 1
    run(*config, "--seed", "1")
    assert figures(find_runs(tmp_path / "logs")[0]) != figures(folders[0])


def test_the_learning_rates_of_the_baseline(run, tmp_path, monkeypatch):
    """All 80 epochs through the program, each cut short: the rates are the scheduler's, not the test's."""
    rates = []

    def epoch(step, batches, learning_rate, *_):
        rates.append(learning_rate(47))  # of the epoch's last step, too
        return Result(1.0, 10.0)

    monkeypatch.setattr(main, "train_epoch", epoch)
    monkeypatch.setattr(main, "evaluate", lambda *_: Result(1.0, 10.0))
    assert run()[0] == 0
    lines = (only_run(tmp_path) / "model_accuracy.log").read_text().splitlines()
    logged = {int(line.split()[0]): line.split()[1] for line in lines if line[0] != "#" and "epoch" not in line}
    assert len(logged) == 80
    assert {epoch: logged[epoch] for epoch in RATES} == {epoch: f"{rates[epoch]:.6f}" for epoch in RATES} == RATES


def test_with_validation_the_test_images_wait_for_the_end(run, tmp_path):
    status, out, _ = run("--epochs", "3", "--validation", "9")
    assert status == 0
    folder = only_run(tmp_path)
    rows = read_run(folder).rows
    assert f"Final accuracy: validation {rows[-1]['val_acc']:.2f} %, test {rows[-1]['test_acc']:.2f} %, train " in out
    assert [row["test_acc"] == row["test_acc"] for row in rows] == [False, False, True]
    assert all(0 <= row["val_acc"] <= 100 for row in rows)
    assert (folder / "best.safetensors").exists()
    assert read_run(folder).record["dataset"]["train"] == 39


@pytest.mark.parametrize("workers", [(), ("--batches", "workers")])
def test_small_crops_first_then_whole_images_resume_included(run, tmp_path, monkeypatch, workers):
    sides, train_epoch = [], main.train_epoch

    def noting(step, batches, *others):
        batches = list(batches)
        sides.append({images.shape[-1] for images, _ in batches})
        return train_epoch(step, batches, *others)

    monkeypatch.setattr(main, "train_epoch", noting)
    line = ("--epochs", "4", "--crop-size", "24", "--uncropped-share", "0.5", *workers)
    assert run(*line)[0] == 0
    whole = only_run(tmp_path)
    assert sides == [{24}, {24}, {32}, {32}]
    at_epoch(monkeypatch, 2, raising(KeyboardInterrupt()))
    assert run(*line)[0] == 130
    assert run("--resume")[0] == 0
    assert figures(find_runs(tmp_path / "logs")[0]) == figures(whole)


def test_without_cifar10_auto_is_a_demonstration_with_a_banner(run, tmp_path, monkeypatch):
    real = synthetic()
    monkeypatch.setattr("tinycnn.data.loading.synthetic", lambda: Images(
        "synthetic", real.class_names, Split(real.train.images[:64], real.train.labels[:64]),
        Split(real.test.images[:32], real.test.labels[:32]), real.validation))
    monkeypatch.chdir(tmp_path)  # where there is no folder "data"
    status, out, err = run("--dataset", "auto", "--data-dir", Config.data_dir)
    assert status == 0
    assert "*  DEMONSTRATION on built-in drawn shapes" in out
    assert "could not be downloaded" in err
    for name in ("logs/model_accuracy.log", f"logs/runs/{only_run(tmp_path).name}/model_accuracy.log"):
        comments, rows = read_log(tmp_path / name)
        assert "DEMONSTRATION" in comments[1]
        assert len(rows) == 5


@pytest.mark.parametrize(("arguments", "words"), [
    (["--lr", "-0.1"], "--lr is -0.1"), (["--lr", "nan"], "--lr is nan"), (["--momentum", "1.5"], "--momentum is 1.5"),
    (["--batch-size", "0"], "--batch-size is 0"), (["--epochs", "0"], "--epochs is 0"),
    (["--epochs", "many"], "invalid int value"), (["--learning-rate", "1"], "unknown argument --learning-rate"),
    (["--epoch", "1"], "unknown argument --epoch: did you mean --epochs?"),
    (["--recipe", "fsat"], "there is no recipe 'fsat': did you mean fast?"),
    (["--dataset", "foldr"], "--dataset is 'foldr', but must be one of auto, cifar10, folder, synthetic: did you mean folder?"),
    (["--device", "gpu"], "--device is 'gpu'"), (["--device", "cuda:999"], "device is cuda:999, but this PyTorch finds"),
    (["--data-dir", "/nowhere"], "there is no folder"), (["fly"], "unknown argument fly"),
    (["--dataset", "cifar10", "--data-dir", "/nowhere"], "could not be downloaded"),
    (["--dataset", "auto", "--data-dir", "/nowhere"], "/nowhere"), (["--name", "x.safetensors"], "--name is 'x.safetensors'"),
    (["--validation", "100"], "--validation 100 takes 34 images of each class"), (["--data-dir", "x" * 300], "x" * 300),
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
    assert "device is cuda, but this PyTorch finds 0 cuda devices: use --device cpu" in one_line(err)


def test_a_log_folder_that_is_a_runs(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    status, _, err = run("--epochs", "1", "--log-dir", only_run(tmp_path))
    assert status == 2
    assert "is the folder of a run" in one_line(err)


def test_a_log_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "logs").write_text("mine")
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "logs/runs can't be made (Not a directory): choose another --log-dir" in one_line(err)
    assert (tmp_path / "logs").read_text() == "mine"


def test_an_error_of_the_machine_is_one_line(run, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr(main, "load_images", failing)
    status, _, err = run()
    assert status == 2
    assert "Input/output error: 'disk'" in one_line(err)


def test_a_command_to_copy_keeps_its_spaces(command, pictures, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 1, raising(KeyboardInterrupt()))
    logs = tmp_path / "two  spaces"
    status, _, err = command("--dataset", "folder", "--data-dir", pictures, "--log-dir", logs, "--epochs", "2", *SMALL)
    assert status == 130
    assert f"resume with: python main.py --resume '{find_runs(logs)[0]}'\n" in one_line(err)
    assert command("--resume", find_runs(logs)[0])[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_cannot_be_written_is_one_line(pictures, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "main.py", "--dataset", "folder", "--data-dir", pictures, "--log-dir",
                               tmp_path, "--epochs", "1"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "No space left on device" in one_line(done.stderr)


def test_an_output_that_is_closed_is_no_dead_worker(pictures, tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "main.py", "--dataset", "folder", "--data-dir", pictures, "--log-dir",
                                tmp_path, "--epochs", "1", "--no-pictures"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 2
    assert "stopped: the output was closed" in one_line(err)


def test_closed_outputs_end_no_run(pictures, tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "--dataset", "folder", "--data-dir", str(pictures), "--log-dir",
               str(tmp_path), "--epochs", "1", "--no-pictures"]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]).returncode == 0
    assert read_run(find_runs(tmp_path)[0]).summary["epochs"] == 1
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command, "--wrong"]).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to catch")
def test_a_signal_before_the_run_begins_is_one_line_too():
    code = ("import sys, os, signal; sys.argv = ['main.py', '--epochs', '1']\nfrom tinycnn.commands.start import parse_or_exit\n"
            "parse_or_exit(); os.kill(os.getpid(), signal.SIGTERM); print('still here')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "stopped by SIGTERM\n")


def test_a_file_system_without_locks_is_named_and_leaves_no_run(run, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "has no file locks (No locks available)" in one_line(err)
    assert find_runs(tmp_path / "logs") == []


def test_compare_without_the_reference_run_says_how_to_restore_it(command, run, tmp_path, monkeypatch):
    assert run("--epochs", "1")[0] == 0
    monkeypatch.setattr(compare, "REFERENCE", tmp_path / "gone")
    status, _, err = command("compare", "--log-dir", tmp_path / "logs")
    assert status == 2
    assert f"restore it with git -C {ROOT} checkout -- logs/reference" in one_line(err)


def test_the_default_data_dir_typed_out_must_hold_cifar10(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = command("--data-dir", Config.data_dir, "--log-dir", tmp_path / "logs")
    assert status == 2
    assert "CIFAR-10 is not in data" in one_line(err)


def test_a_damaged_reference_ends_no_run(run, tmp_path, monkeypatch):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text("{}")
    monkeypatch.setattr(main, "REFERENCE", tmp_path / "reference")
    assert run("--epochs", "1")[0] == 0


def test_initialization_and_dropout_follow_the_settings(run, monkeypatch):
    nets = []
    monkeypatch.setattr(main, "train_epoch", lambda step, *_: (nets.append(step.net), Result(1.0, 10.0))[1])
    for settings in (("--seed", "0"), ("--seed", "1"), ("--seed", "0", "--dropout", "0.3")):
        assert run("--epochs", "1", *settings)[0] == 0
    first, other, with_dropout = (next(net.parameters()) for net in nets)
    assert torch.equal(first, with_dropout)
    assert not torch.equal(first, other)
    assert [module.p for module in nets[2].modules() if isinstance(module, torch.nn.Dropout)] == [0.3]


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(main, "train_epoch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--epochs", "1")


def test_a_diverging_loss_stops_the_run(run, tmp_path):
    status, _, err = run("--epochs", "5", "--lr", "1000", "--weight-decay", "10")
    assert status == 2
    assert "the loss became" in one_line(err)
    assert "lower --lr" in err
    assert "resuming would diverge again" in err
    assert not (only_run(tmp_path) / "summary.json").exists()


def test_weights_that_blow_up_in_the_last_step_are_no_result(run, tmp_path, monkeypatch):
    """The training figures were still finite; the test shows it."""
    def last_step(step, *_):
        next(step.net.parameters()).data.fill_(torch.nan)
        return Result(1.0, 50.0)

    monkeypatch.setattr(main, "train_epoch", last_step)
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "the loss became nan" in one_line(err)
    assert "no epoch is finished yet" in err
    assert not (only_run(tmp_path) / "final.safetensors").exists()


def test_into_a_pipe_an_epoch_is_a_line_and_no_slow_import_is_made(pictures, tmp_path):
    process = start_program("--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path), "--epochs", "2",
                    "--workers", "1", "--threads", "1", "--batch-size", "16", "--device", "cpu", "--no-pictures",
                    before="import urllib.request\n"
                           "from tinycnn.commands import start\n"
                           "urllib.request.OpenerDirector.open = lambda *_, **__: print('phoned home')\n"
                           "leave = start._exit\n"
                           "start._exit = lambda status: (print(*sys.modules), leave(status))")
    out, err = process.communicate(timeout=120)
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
    whole = load_images("cifar10", str(cifar10))
    part = Images("cifar10", whole.class_names, Split(whole.train.images[:2000], whole.train.labels[:2000]),
                  Split(whole.test.images[:500], whole.test.labels[:500]), whole.validation)
    monkeypatch.setattr(main, "load_images", lambda *_: part)
    assert command("--dataset", "cifar10", "--epochs", "2", "--batch-size", "32", "--workers", "0", "--device", "cpu",
                   "--log-dir", tmp_path / "logs")[0] == 0
    rows = read_run(only_run(tmp_path)).rows
    assert rows[-1]["train_acc"] > 20  # chance is 10


def test_training_has_the_settings(run, monkeypatch):
    assert run("--epochs", "1", "--name", "wide")[0] == 0
    steps, threads, seeds, determinism = [], [], [], []

    def look(step, *_):
        steps.append(step)
        threads.append(torch.get_num_threads())
        seeds.append(torch.initial_seed())
        return Result(1.0, 10.0)

    monkeypatch.setattr(main, "train_epoch", look)
    monkeypatch.setattr(main, "set_determinism", lambda config: determinism.append(config.deterministic))
    assert run("--epochs", "2", "--momentum", "0.7", "--nesterov", "--weight-decay", "0.123", "--label-smoothing", "0.3",
               "--teacher", "wide", "--teacher-share", "0.4", "--temperature", "2", "--threads", "2", "--deterministic")[0] == 0
    step, optimizer = steps[0], steps[0].optimizer
    (group,) = optimizer.param_groups
    assert type(optimizer) is SGD
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["dampening"]) == (0.7, True, 0.123, 0)
    assert (step.label_smoothing, step.distillation.weight, step.distillation.temperature) == (0.3, 0.4, 2.0)
    assert sum(type(layer) is FastDilatedConv2d for layer in step.net.modules()) == 1
    assert (threads, determinism) == ([2, 2], [True])
    assert seeds[0] != seeds[1]  # dropout draws other numbers in each epoch


@pytest.mark.parametrize(("batches", "losses"), [("device", [1.1088, 1.1187, 1.0900]), ("workers", [1.1010, 1.1068, 1.0917])])
def test_a_run_draws_what_the_committed_runs_drew(run, tmp_path, batches, losses):
    """Initialization, order and augmentation. Other instructions move these figures by 0.0002, other draws by much more."""
    assert run("--epochs", "3", "--lr", "0.02", "--label-smoothing", "0.1", "--crop-padding", "2", "--batches", batches)[0] == 0
    assert [row["train_loss"] for row in read_run(only_run(tmp_path)).rows] == pytest.approx(losses, abs=5e-4)


def test_the_test_images_are_not_augmented(run, monkeypatch):
    """Also where the training policy would change every image."""
    seen = []

    def evaluated(net, batches, *_):
        seen.append(torch.cat([images for images, _ in batches]))
        return Result(1.0, 10.0)

    monkeypatch.setattr(main, "evaluate", evaluated)
    for batches in ("device", "workers"):
        for flip_p in ("1", "0"):
            run("--epochs", "1", "--batches", batches, "--flip-p", flip_p, "--affine-p", "0", "--coarse-dropout-p", "0")
    assert len(seen) == 4
    assert all(torch.equal(images, seen[0]) for images in seen[1:])


@pytest.mark.parametrize("change", ["optimizer", "per step"])
def test_another_optimizer_or_schedule_is_a_few_lines_and_resumes_exactly(run, tmp_path, monkeypatch, change):
    """What a user would edit in tinycnn/training/optimizer.py or tinycnn/training/schedule.py; the resumed run is the one never interrupted."""
    if change == "optimizer":
        def adamw(net, config, device):
            return torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)

        edit(monkeypatch, "make_optimizer", adamw)
    else:
        def one_cycle(config, epoch: float) -> float:
            done = epoch / config.epochs
            return config.lr * (done / 0.3 if done < 0.3 else (1 - done) / 0.7)

        edit(monkeypatch, "learning_rate", one_cycle)
    assert run("--epochs", "3", "--log-dir", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        assert run("--epochs", "3")[0] == 130
    assert run("--resume")[0] == 0
    (whole,) = find_runs(tmp_path / "whole")
    assert weights_of(only_run(tmp_path)) == weights_of(whole)
    assert figures(only_run(tmp_path)) == figures(whole)


def test_a_run_ends_with_where_it_stands_beside_the_reference_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "evaluate", lambda *_: Result(1.0, 40.0))
    assert "reference" not in run("--epochs", "1")[1]  # which is on other images
    monkeypatch.setattr(main, "REFERENCE", only_run(tmp_path))
    monkeypatch.setattr(main, "evaluate", lambda *_: Result(1.0, 55.5))
    out = run("--epochs", "1", "--seed", "1")[1]
    assert "That is +15.50 percentage points from the reference run, 40.00 % after 1 epoch\n" in out
