"""One run by several processes: their parts put together are the whole, and whatever becomes of one of them, the run is safe.

The processes meet in a file instead of at a port, and gloo uses the loopback interface."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import NO_NETWORK, ROOT, SMALL, figures, one_line, only_run, run_line, synthetic, weights_of
from torch import nn
from tqdm import tqdm

from config import Config, UserError
from tinycnn.data.batches import make_batches, make_policies
from tinycnn.data.dataset import Images
from tinycnn.data.synthetic import draw
from tinycnn.runs.finding import RunState, find_runs, run_state
from tinycnn.runs.record import read_run
from tinycnn.training.distributed import ALONE, Processes, batch_sizes, join_processes, synchronize_norms
from tinycnn.training.epoch import evaluate, train_epoch
from tinycnn.training.machine import seed_torch
from tinycnn.training.step import TrainStep

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)
PROCESSES.set_forkserver_preload(["main", "torch.distributed", "albumentations"])
CPU = torch.device("cpu")
LIMIT = 100  # seconds until a process is killed


# ---------------------------------------------------------------- processes

def start(size: int, folder: Path, target, *arguments, environment=()) -> list:
    """Start `target(*arguments)` in `size` processes, as torchrun does; what they print goes to folder/out-RANK, err-RANK."""
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    processes = [PROCESSES.Process(target=_begin, args=(rank, size, folder, dict(environment), target, arguments))
                 for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list) -> list[int]:
    """The exit statuses, at the latest when LIMIT is over."""
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _begin(rank, size, folder, environment, target, arguments) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                       "GLOO_SOCKET_IFNAME": "lo", **NO_NETWORK, **environment})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    torch.set_num_threads(1)
    dist.rendezvous = lambda *_, **__: iter([(dist.FileStore(str(folder / "store"), size), rank, size)])
    target(*arguments)


def program(line: list[str], epoch: int = -1, rank: int = -1, action: str = "") -> None:
    """Run main.py's command line; before that epoch of training, the process of that rank (-1: each) does
    what `action` says."""
    import main

    train_epoch, calls = main.train_epoch, iter(range(100))

    def acting(*arguments):
        if next(calls) == epoch and rank in (-1, int(os.environ["RANK"])):
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            elif action == "fail":
                raise UserError("the lamp is out: change it")
        return train_epoch(*arguments)

    if action == "no norms":
        main.Net = lambda num_classes, **_: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    main.train_epoch = acting
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(run_line(line))


@pytest.fixture
def train(pictures, tmp_path):
    """train(2, "--epochs", "2") -> (statuses, stdouts, stderrs) of two processes; logs in tmp_path/logs."""
    def train(size: int, *line: str, logs: str = "logs", environment=(), **doing):
        base = ["--dataset", "folder", "--data-dir", str(pictures), *SMALL]
        if "--resume" in line:
            base = []
        processes = start(size, tmp_path / "processes", program, ["--log-dir", str(tmp_path / logs), *base, *line],
                          *doing.values(), environment=environment)
        statuses = wait(processes)
        texts = [[(tmp_path / "processes" / f"{name}-{rank}").read_text() for rank in range(size)] for name in ("out", "err")]
        return statuses, *texts

    return train


# ---------------------------------------------------------------- parts

@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 80, 127, 128])
def test_the_parts_of_a_batch_are_the_batch_and_nearly_equal(size, count):
    parts = [range(count)[Processes(rank, size).share_of(count)] for rank in range(size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("batches", ["device", "workers"])
def test_the_batches_of_all_processes_put_together_are_those_of_one(size, batches):
    images = synthetic()
    images = type(images)("synthetic", images.class_names, draw(80, 1), draw(37, 2), draw(5, 3))
    config = Config(batches=batches, batch_size=32, workers=0, crop_padding=2)
    policies = make_policies(config, *images.statistics)
    whole = make_batches(config, images, policies, CPU)
    parts = [make_batches(config, images, policies, CPU, Processes(rank, size).share_of) for rank in range(size)]
    for stream in (lambda made: made.shuffled("train", 3), lambda made: made.in_order("test"),
                   lambda made: made.in_order("validation")):
        for (pixels, labels), *shares in zip(stream(whole), *map(stream, parts), strict=True):
            assert torch.equal(pixels, torch.cat([share[0] for share in shares]))
            assert torch.equal(labels, torch.cat([share[1] for share in shares]))
            assert len(shares[0][1]) < len(labels) or len(labels) < 2


def test_the_sizes_of_the_whole_batches():
    assert list(batch_sizes(80, 32)) == [32, 32, 16]


# ---------------------------------------------------------------- one step, one epoch, one test

def small_net(norm: bool = False) -> nn.Module:
    """Smooth, so that rounding flips no unit on or off."""
    seed_torch(0, 0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.Tanh(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 10))


def stream(processes: Processes) -> list:
    """Three batches, the last with one image."""
    split = draw(22, 1)
    images = torch.from_numpy(split.images).permute(0, 3, 1, 2).float() / 255
    chunks = zip(images[:21].split(10), torch.from_numpy(split.labels)[:21].split(10), strict=True)
    return [(pixels[processes.share_of(len(labels))], labels[processes.share_of(len(labels))]) for pixels, labels in chunks]


def one_epoch(processes: Processes, norm: bool = False) -> dict:
    """What an epoch of training and a test leave: gradients of the last batch, weights, metrics, learning-rate arguments."""
    net = small_net(norm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    step, seen, gradients = TrainStep(net, optimizer, CPU, 0.1, processes=processes), [], []
    optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in net.parameters()]))
    with tqdm(disable=True) as bar:
        result = train_epoch(step, stream(processes), lambda images: seen.append(images) or 0.1, bar, batch_sizes(21, 10))
    tested = evaluate(net, stream(processes), CPU, processes)
    return {"gradients": gradients, "net": net.state_dict(), "result": tuple(result), "tested": tuple(tested), "seen": seen}


def save_one_epoch(folder: Path) -> None:
    with join_processes() as processes:
        torch.save([one_epoch(processes), one_epoch(processes, norm=True)], folder / f"{processes.rank}.pt")


@pytest.fixture(scope="module", params=[2, 3])
def epochs(request, tmp_path_factory):
    """What one_epoch gives in each of two and of three processes, without and with BatchNorm."""
    folder = tmp_path_factory.mktemp("epochs")
    assert wait(start(request.param, folder, save_one_epoch, folder)) == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_gradients_are_those_of_the_mean_over_the_whole_batch(epochs):
    """Also with parts of 4, 3 and 3 images, and where a process has none."""
    alone = one_epoch(ALONE)
    for plain, _ in epochs:
        for ours, theirs in zip(plain["gradients"], alone["gradients"], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        for name, tensor in alone["net"].items():
            torch.testing.assert_close(plain["net"][name], tensor, rtol=0, atol=1e-6)


def test_metrics_are_those_of_all_images(epochs):
    alone = one_epoch(ALONE)
    for plain, _ in epochs:
        assert plain["seen"] == alone["seen"] == [0, 10, 20]
        for figure in ("result", "tested"):
            assert plain[figure] == pytest.approx(alone[figure], rel=1e-5)


def test_all_processes_end_with_the_same_network(epochs):
    """The statistics of BatchNorm, which each process has of its own images, are then those of the first."""
    for kind in (0, 1):
        first, *others = [each[kind]["net"] for each in epochs]
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in epochs[-1][1]["net"].values())  # whose last part was empty


def test_dropout_differs_between_processes():
    draws = []
    for rank in range(2):
        seed_torch(5, 3, rank)
        draws.append(torch.rand(4))
    seed_torch(5, 3)
    assert torch.equal(torch.rand(4), draws[0])
    assert not torch.equal(*draws)


# ---------------------------------------------------------------- what each may do

def test_without_torchrun_nothing_is_asked_of_anyone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_processes() as processes:
        assert processes is ALONE
    assert not dist.is_initialized()
    assert ALONE.describe() == {}


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    one = Processes(3, 4, 1, 2)
    assert one.device_name("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert one.device_name("auto") == one.device_name("cuda") == "cuda:1"
    assert one.device_name("cpu") == "cpu"
    assert ALONE.device_name("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="--device is cuda:0"):
        one.device_name("cuda:0")


def test_norms_are_synchronized_on_cuda_only():
    net = small_net(norm=True)
    assert synchronize_norms(net, Processes(0, 2), CPU) is net
    assert synchronize_norms(net, ALONE, torch.device("cuda")) is net
    synchronized = synchronize_norms(net, Processes(0, 2), torch.device("cuda"))
    assert [type(layer) for layer in synchronized][1] is nn.SyncBatchNorm
    assert synchronized.state_dict().keys() == net.state_dict().keys()


def test_other_commands_refuse_several_processes(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = command("compare")
    assert status == 2
    assert "torchrun trains one run" in one_line(err)


# ---------------------------------------------------------------- the whole program

def test_a_run_of_two_processes_is_one_run_and_repeats_to_the_bit(train, tmp_path):
    folders = []
    for logs in ("one", "two"):
        statuses, out, err = train(2, "--epochs", "2", "--dropout", "0.2", "--validation", "9", "--capture", "on", logs=logs)
        assert statuses == [0, 0]
        assert err == ["", ""]
        assert out[1] == ""
        folders += find_runs(tmp_path / logs)
    one, two = folders
    assert weights_of(one) == weights_of(two)
    assert figures(one) == figures(two)
    log = (one / "model_accuracy.log").read_text()
    assert ", 2 processes" in log
    assert "BatchNorm uses the statistics of each process in training" in log
    assert "Steps are not captured" in out[0]


def test_a_teacher_smoothed_labels_and_workers_give_what_they_give_one_process(train, run, tmp_path):
    assert run("--epochs", "1", "--validation", "9", "--name", "wide", "--width", "2")[0] == 0
    line = ("--epochs", "2", "--validation", "9", "--teacher", "wide", "--label-smoothing", "0.1", "--batches", "workers",
            "--workers", "1", "--lr", "0.5")
    rows = []
    for size in (1, 2):
        statuses, _, err = train(size, *line, epoch=-1, rank=-1, action="no norms")
        assert (set(statuses), set(err)) == ({0}, {""})
        rows.append(read_run(find_runs(tmp_path / "logs")[0]).rows)
    for one, two in zip(*rows, strict=True):
        assert {name: value for name, value in one.items() if name != "seconds"} == pytest.approx(
            {name: value for name, value in two.items() if name != "seconds"}, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("killed", [0, 1])
def test_after_kill_9_of_either_process_the_run_goes_on_with_another_number(train, tmp_path, killed):
    statuses, _, err = train(2, "--epochs", "3", epoch=1, rank=killed, action="kill")
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 2
    folder = only_run(tmp_path)
    assert run_state(folder) is RunState.UNFINISHED
    assert err[killed] == ""
    if killed == 1:
        assert "another process of this run has ended; epoch 0 is safe; resume with" in one_line(err[0])
    statuses, _, err = train(3, "--resume")
    assert (statuses, err) == ([0, 0, 0], ["", "", ""])
    run = read_run(folder)
    assert len(run.rows) == 3
    assert any("processes 2 -> 3" in note for note in run.record["notes"])


def test_sigterm_to_all_ends_all_with_one_line(train, tmp_path):
    statuses, _, err = train(2, "--epochs", "3", epoch=1, rank=-1, action="stop")
    assert statuses[0] == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; epoch 0 is safe" in one_line(err[0])
    assert err[1] == ""


def test_what_goes_wrong_in_another_process_is_told_by_the_first(train):
    statuses, _, err = train(2, "--epochs", "3", epoch=1, rank=1, action="fail")
    assert statuses == [2, 2]
    assert "error: process 1: the lamp is out: change it; epoch 0 is safe" in one_line(err[0])
    assert err[1] == ""


def test_what_goes_wrong_in_all_is_told_once(train):
    statuses, _, err = train(2, "--epochs", "1", "--validation", "48")
    assert statuses == [2, 2]
    assert "--validation 48" in one_line(err[0])
    assert err[1] == ""


def test_after_torchruns_restart_the_run_goes_on_to_the_same_bits(train, tmp_path):
    job = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0"}
    line = ("--epochs", "3", "--dropout", "0.2")
    assert train(2, *line, logs="whole")[0] == [0, 0]
    train(2, *line, environment=job, epoch=1, rank=1, action="kill")
    statuses, _, err = train(2, *line, environment=job | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert (statuses, err) == ([0, 0], ["", ""])
    assert weights_of(only_run(tmp_path)) == weights_of(find_runs(tmp_path / "whole")[0])
    assert figures(only_run(tmp_path)) == figures(find_runs(tmp_path / "whole")[0])
    statuses, out, _ = train(2, *line, environment=job | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert statuses == [0, 0]
    assert out[0] == "the run of this job is finished\n"
    only_run(tmp_path)


def test_each_process_hands_over_the_gradients_of_a_sum(monkeypatch):
    """Of means, SyncBatchNorm would add up those of parts of different sizes with wrong weights."""
    torch.manual_seed(0)
    net, images, labels, found = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(3, 3, 2, 2), torch.arange(3), []
    monkeypatch.setattr(Processes, "average_gradients", lambda processes, net, count: found.append(net[1].weight.grad.clone()))
    for size in (1, 2):
        TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.0), CPU, 0.0, processes=Processes(size=size))(images, labels)
    assert torch.allclose(found[1], 3 * found[0], rtol=1e-4)


def load_in_turn(folder: Path) -> None:
    """Of two machines with two processes each; the second machine is the slower one."""
    def load(dataset: str, data_dir: str):
        started = time.monotonic()
        time.sleep(2 if rank == 2 else 0.3)
        (folder / f"load-{rank}").write_text(f"{dataset} {started} {time.monotonic()}")
        images = draw(10, 1), draw(10, 2), draw(0, 3)
        return Images("synthetic", tuple("0123456789"), *images)

    rank = int(os.environ["RANK"])
    os.environ.update({"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"})
    with join_processes() as processes:
        processes.load_images(load, Config(dataset="auto"))


def test_one_process_of_a_machine_loads_the_images_before_its_others(tmp_path):
    assert wait(start(4, tmp_path, load_in_turn, tmp_path)) == [0] * 4
    kinds, started, ended = zip(*((tmp_path / f"load-{rank}").read_text().split() for rank in range(4)), strict=True)
    assert kinds == ("auto", "synthetic", "synthetic", "synthetic")  # what auto is, the first decides
    for first, other in ((0, 1), (2, 3)):
        assert float(ended[first]) <= float(started[other])


def test_images_that_differ_between_machines_are_refused():
    broadcasts = iter(["synthetic", "of other images"])

    class Second(Processes):
        def broadcast(self, compute):
            return next(broadcasts)

        def sum(self, *values):
            return list(values)

    with pytest.raises(UserError, match="are not those of the first process: all machines need the same"):
        Second(rank=1, size=2, local_rank=0).load_images(lambda *_: synthetic(), Config())


# ---------------------------------------------------------------- torchrun itself

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.rendezvous = lambda *_, **__: iter([(dist.FileStore({store!r} + attempt, 2), int(os.environ["RANK"]), 2)])
import main
from tinycnn.runs import writer
from tinycnn.commands.start import parse_or_exit, run_or_exit
writer.INTERVAL = 0
train_epoch, epochs = main.train_epoch, iter(range(100))
def acting(*arguments):
    if next(epochs) == 2 and attempt == "0":
        {action}
    return train_epoch(*arguments)
main.train_epoch = acting
run_or_exit(parse_or_exit(), main.train)
"""


def torchrun(tmp_path, pictures, action: str, *options: str) -> subprocess.Popen:
    """torchrun with two processes, of which those that `action` says die before the third epoch."""
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), store=str(tmp_path / "store"), action=action))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d",
         f"--rdzv-endpoint={tmp_path / 'rendezvous'}", "--rdzv-conf=store_type=file", "--rdzv-id=test", *options,
         str(tmp_path / "script.py"), "--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"),
         *SMALL, "--epochs", "4"],
        env=os.environ | NO_NETWORK | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_torchruns_restart_goes_on_with_the_run(tmp_path, pictures):
    kill = 'os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGKILL)'
    program = torchrun(tmp_path, pictures, kill, "--max-restarts=1")
    out, err = program.communicate(timeout=LIMIT)
    assert program.returncode == 0, err
    assert len(read_run(only_run(tmp_path)).rows) == 4
    assert out.count("run: ") == 2
    # torchrun's SIGTERM may come before the collective operation fails
    assert re.search("(error: another process of this run has ended|stopped by SIGTERM); epochs 0 to 1 are safe", err), err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_ends_all_processes(tmp_path, pictures, number):
    program = torchrun(tmp_path, pictures, 'print("now", flush=True) or __import__("time").sleep(60)')
    while "now" not in program.stdout.readline():
        assert program.poll() is None
    program.send_signal(number)
    _, err = program.communicate(timeout=LIMIT)
    assert program.returncode != 0
    assert err.count(f"stopped by {number.name}; epochs 0 to 1 are safe") == 1
    assert run_state(only_run(tmp_path)) is RunState.UNFINISHED
