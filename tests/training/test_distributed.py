"""One run by several processes: their parts put together are the whole, and whatever becomes of one of them, the run is safe.

The processes meet in a file instead of at a port, and gloo uses the loopback interface."""

import gc
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from conftest import NO_NETWORK, ROOT, SMALL, figures, one_line, only_run, run_line, start_program, weights_of
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

import main
from augmentation import test_policy as normalize_policy
from augmentation import train_policy
from config import Config, UserError
from tinycnn.data.batches import make_batches
from tinycnn.data.dataset import Dataset
from tinycnn.data.synthetic import draw
from tinycnn.data.tensors import Epoch
from tinycnn.processes import Processes, world
from tinycnn.runs import inputs
from tinycnn.runs.finding import RunState, find_runs, run_state
from tinycnn.runs.record import read_run
from tinycnn.training import distributed
from tinycnn.training import progress as progress_module
from tinycnn.training.distillation import Distillation
from tinycnn.training.distributed import distribute, join_processes, step_on_parts
from tinycnn.training.machine import prepare, seed_torch
from tinycnn.training.optimizer import SGD
from tinycnn.training.steps import fastest_step

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as start.parse_or_exit sets it, for processes that load torch after this
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)
PROCESSES.set_forkserver_preload(["main", "torch._dynamo", "albumentations", "tinycnn.inference.result"])
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


def program(line: list[str], action: str = "", rank: int = -1) -> None:
    """Run main.py's command line; before epoch 1 of training, or the second test, the process of that rank (-1: each) does what
    `action` says."""
    function = "test_epoch" if "test" in action else "train_epoch"
    right, calls = getattr(main, function), iter(range(100))

    def acting(*arguments):
        if next(calls) == 1 and rank in (-1, world.rank):
            if action.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            elif action == "fail":
                raise UserError("the lamp is out: change it")
        return right(*arguments)

    if action == "no norms":
        main.Net = net_without_norms
    setattr(main, function, acting)
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(run_line(line))


def net_without_norms(num_classes: int, **_) -> nn.Module:
    """What several processes train as one does."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))


@pytest.fixture(scope="module")
def train(pictures, tmp_path_factory):
    """train(2, logs, "--epochs", "2") -> (statuses, stdouts, stderrs) of two processes with this --log-dir."""
    def train(size: int, logs: Path, *line: str, environment=(), **doing):
        base = [] if "--resume" in line else ["--dataset", "folder", "--data-dir", str(pictures), *SMALL]
        folder = tmp_path_factory.mktemp("processes")
        statuses = wait(start(size, folder, program, ["--log-dir", str(logs), *base, *line], *doing.values(),
                              environment=environment))
        return statuses, *([(folder / f"{name}-{rank}").read_text() for rank in range(size)] for name in ("out", "err"))

    return train


@pytest.fixture
def process(monkeypatch):
    """process(1, 3): from now on this is process 1 of 3."""
    def process(rank: int, size: int) -> Processes:
        monkeypatch.setattr(world, "rank", rank)
        monkeypatch.setattr(world, "size", size)
        return world

    return process


# ---------------------------------------------------------------- parts

@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 80, 127, 128])
def test_the_parts_of_a_batch_are_the_batch_and_nearly_equal(size, count):
    parts = [range(count)[Processes(rank, size).share_of(count)] for rank in range(size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("batches", ["device", "workers"])
def test_the_batches_of_all_processes_put_together_are_those_of_one(process, size, batches):
    images = Dataset("synthetic", tuple("0123456789"), draw(17, 1), draw(9, 2), draw(5, 3))
    made = make_batches(Config(batches=batches, batch_size=8, workers=0), images, train_policy, normalize_policy, CPU)

    def taken(rank: int, of: int) -> list:
        process(rank, of)
        return [*made.train(3), *made.test(), *made.validation()]

    for (pixels, labels), *shares in zip(taken(0, 1), *(taken(rank, size) for rank in range(size)), strict=True):
        assert torch.equal(pixels, torch.cat([share[0] for share in shares]))
        assert torch.equal(labels, torch.cat([share[1] for share in shares]))
        assert len(shares[0][1]) < len(labels) or len(labels) == 1


def test_the_bar_of_an_epoch_counts_the_images_of_all_processes(process, monkeypatch):
    process(0, 2)
    counts, bar = [], MagicMock()
    bar.__enter__.return_value.update = counts.append
    monkeypatch.setattr(progress_module, "tqdm", lambda **_: bar)
    list(progress_module.progress(Epoch(iter([(torch.zeros(3), torch.zeros(3))]), 6)))
    assert counts == [6]


def test_random_numbers_differ_between_processes(process):
    draws = []
    for rank in range(2):
        process(rank, 2)
        seed_torch(5, 3)
        draws.append(torch.rand(4))
    assert not torch.equal(*draws)


def test_each_process_has_a_gpu_of_its_own(process, monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tinycnn.training.machine.find_device", lambda name: found.append(name) or CPU)
    monkeypatch.setattr(process(3, 4), "local_rank", 1)
    for name in ("auto", "cuda", "cpu"):
        prepare(Config(device=name, threads=torch.get_num_threads()))
    assert found == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UserError, match="--device is cuda:0"):
        prepare(Config(device="cuda:0"))


class OnCuda(nn.Sequential):
    """A network that says that it lies on CUDA."""

    def parameters(self, recurse: bool = True):
        return iter([SimpleNamespace(device=torch.device("cuda", 1))])


def test_norms_are_synchronized_on_cuda_only(process, monkeypatch):
    monkeypatch.setattr(process(0, 2), "broadcast", lambda compute: compute())
    monkeypatch.setattr(distributed, "Parallel", lambda net, **settings: (net, settings["device_ids"]))
    optimizer, cuda = SGD([nn.Parameter(torch.zeros(1))], lr=0.1), torch.device("cuda", 1)
    scheduler = OneCycleLR(optimizer, 0.5, total_steps=4)
    for kind, norm, device_ids in ((nn.Sequential, nn.BatchNorm2d, None), (OnCuda, nn.SyncBatchNorm, [cuda])):
        net, given = distribute(kind(nn.BatchNorm2d(3)), optimizer, scheduler)
        assert (type(net[0]), given) == (norm, device_ids)


def test_there_is_a_limit_to_the_meeting(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "SILENCE", 0.1)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=0.3))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([time.sleep(5)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"can't find each other \(not within 0:00:00.3.*unset WORLD_SIZE"), join_processes():
        pass
    assert world.size == 1
    assert "waiting for the other 1 of 2 processes" in capsys.readouterr().err


# ---------------------------------------------------------------- an epoch of training and a test

def batches(scale: float = 1) -> Epoch:
    """This process's parts of batches of 10, 10 and 1 images."""
    images = torch.randn(21, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = [whole[world.share_of(len(whole))] for whole in torch.arange(21).split(10)]
    return Epoch(iter([(scale * images[indices], indices % 10) for indices in order]), 21)


def small_net(norm: bool) -> nn.Module:
    """A smooth net, in float64, so that rounding flips no unit on or off. Processes begin with different weights."""
    seed_torch(0, 0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.Tanh(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 10)).double()


def cross_entropy(images, logits, labels):
    """main.py's computes in float32."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def distillation():
    torch.manual_seed(7)
    return Distillation([nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()], 0.9, 4.0, 0.1)


def clipped_step(net, optimizer, criterion, images, labels):
    """A train_step that someone may write."""
    logits = net(images)
    loss = criterion(images, logits, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    return torch.stack((loss.detach() * len(labels), (logits.argmax(1) == labels).sum()))


class Saved:
    """A tensor that a graph keeps for its gradients."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def one_epoch(train_step=main.train_step, criterion=cross_entropy, norm: bool = False) -> dict:
    """What an epoch of training and a test leave, after a step that only the first process knows of, from a checkpoint."""
    net = small_net(norm)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler, gradients = OneCycleLR(optimizer, 0.5, total_steps=4, cycle_momentum=False), []
    saved = weakref.WeakSet()

    def save(tensor: torch.Tensor) -> Saved:
        saved.add(kept := Saved(tensor))
        return kept

    if world.is_first:
        generator = torch.Generator().manual_seed(1)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
        scheduler.step()

    def watched(*arguments):
        sums = train_step(*arguments)
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
        return sums

    wrapped = distribute(net, optimizer, scheduler)
    step = fastest_step(watched, wrapped, optimizer, criterion, Config(device="cpu"))
    gc.disable()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept.tensor):
        trained = main.train_epoch(step, wrapped, batches(), scheduler)
    kept = len(saved)
    gc.enable()
    tested = main.test_epoch(wrapped, batches(2))
    return {"gradients": gradients, "net": net.state_dict(), "figures": (*trained, *tested), "kept": kept}


def epochs_of_all_kinds() -> dict[str, dict]:
    return {"plain": one_epoch(), "again": one_epoch(), "clipped": one_epoch(clipped_step),
            "teacher": one_epoch(criterion=distillation()), "norm": one_epoch(norm=True)}


def load_in_turn(images: str) -> dict:
    """Load images as on two machines, the second of which has all processes but the first, and is slow."""
    def load(kind: str, data_dir: str) -> Dataset:
        result.update(kind=kind, began=time.monotonic())
        time.sleep(0.5 if world.rank == 1 else 0.1)
        result["ended"] = time.monotonic()
        return Dataset("synthetic", tuple(images), draw(10, 1), draw(10, 2), draw(0, 3))

    result = {}
    world.local_rank, inputs.load_dataset = max(0, world.rank - 1), load
    try:
        inputs._load_in_turn(Config(dataset="auto"))
    except UserError as error:
        result["error"] = str(error)
    return result


def save_epochs(folder: Path) -> None:
    with join_processes():
        rank = world.rank
        torch.save((epochs_of_all_kinds(), load_in_turn("0123456789"), load_in_turn(f"012345678{rank}")), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def alone():
    return epochs_of_all_kinds()


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """What two and three processes make of it."""
    folder = tmp_path_factory.mktemp("epochs")
    statuses = wait(start(request.param, folder, save_epochs, folder))
    assert statuses == [0] * request.param, (folder / "err-0").read_text()
    assert (folder / "err-0").read_text() == ""
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(request.param)), strict=True))


@pytest.mark.parametrize("kind", ["plain", "clipped", "teacher"])
def test_gradients_weights_and_figures_are_those_of_the_whole_batches(results, alone, kind):
    """Also with parts of 4, 3 and 3 images, and where a process has none."""
    allowed = 1e-7 if kind == "teacher" else 4e-15  # the loss is computed in float32
    for epochs in results[0]:
        for ours, theirs in zip(epochs[kind]["gradients"], alone[kind]["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)
        torch.testing.assert_close(epochs[kind]["net"], alone[kind]["net"], rtol=0, atol=allowed)
        assert epochs[kind]["figures"] == pytest.approx(alone[kind]["figures"], rel=1e-6)


def test_all_processes_end_with_the_same_network_and_figures(results):
    first, *others = results[0]
    for kind in first:
        assert all(other[kind]["figures"] == first[kind]["figures"] for other in others)
        assert all(torch.equal(tensor, other[kind]["net"][name]) for name, tensor in first[kind]["net"].items()
                   for other in others)
    assert all(torch.equal(tensor, first["again"]["net"][name]) for name, tensor in first["plain"]["net"].items())


def test_no_graph_outlives_its_step(results):
    assert {epochs[kind]["kept"] for epochs in results[0] for kind in epochs} == {0}


def test_all_test_with_the_first_ones_running_statistics(results):
    epochs = results[0][-1]["norm"]  # of a process whose last part was empty
    net = small_net(norm=True)
    net.load_state_dict(epochs["net"])
    assert epochs["figures"][2:] == pytest.approx(main.test_epoch(net, batches(2)), rel=1e-6)


def test_one_process_of_a_machine_loads_the_images_before_its_others(results):
    first, *others = results[1]
    assert [each["kind"] for each in (first, *others)] == ["auto"] + ["synthetic"] * len(others)  # the first decides
    assert all(others[0]["ended"] <= other["began"] for other in others[1:])


def test_images_that_differ_between_machines_are_refused(results):
    first, *others = results[2]
    assert "error" not in first
    assert all("are not those of the first process: all machines need the same" in other["error"] for other in others)


def test_an_empty_part_trains_in_float32_also_where_others_have_bfloat16(monkeypatch):
    """On CUDA, SyncBatchNorm exchanges tensors of its input's type where a part is empty, and float32 elsewhere."""
    monkeypatch.setattr("tinycnn.training.machine.has_bfloat16", lambda _: True)
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)
    net, types = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), []
    net.register_forward_hook(lambda net, images, logits: types.append(logits.dtype))
    step = step_on_parts(main.train_step, net, SGD(net.parameters(), lr=0.1), cross_entropy)
    for count in (3, 0):
        step(torch.rand(count, 3, 2, 2), torch.arange(count))
    assert types == [torch.bfloat16, torch.float32]


# ---------------------------------------------------------------- the whole program

# An epoch has batches of 19, 19 and 1 images
LINE = ("--epochs", "3", "--dropout", "0.2", "--validation", "9", "--batch-size", "19", "--capture", "on")


@pytest.fixture(scope="module", params=[2, 3])
def whole(request, train, tmp_path_factory):
    """A run of two and of three processes that nothing interrupts: their number, its folder and stdout."""
    logs = tmp_path_factory.mktemp("whole")
    statuses, out, err = train(request.param, logs, *LINE)
    assert (set(statuses), set(err), set(out[1:])) == ({0}, {""}, {""})  # only the first prints
    (folder,) = find_runs(logs)
    return request.param, folder, out[0]


def test_a_run_of_several_processes_is_one_run(whole):
    size, folder, out = whole
    log = (folder / "model_accuracy.log").read_text()
    assert f", {size} processes" in log
    assert "BatchNorm uses the statistics of each process in training" in log
    assert "Steps are not captured" in out
    assert run_state(folder) is RunState.FINISHED


@pytest.mark.parametrize("whole", [3], indirect=True)  # two once gave equal bits where three did not
def test_stopped_and_resumed_it_is_never_interrupted(whole, train, tmp_path):
    size, folder, _ = whole
    statuses, _, err = train(size, tmp_path / "logs", *LINE, action="stop")
    assert statuses[0] == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; epoch 0 is safe" in one_line(err[0])
    assert set(err[1:]) == {""}
    statuses, _, err = train(size, tmp_path / "logs", "--resume")
    assert (set(statuses), set(err)) == ({0}, {""})
    assert weights_of(only_run(tmp_path)) == weights_of(folder)
    assert figures(only_run(tmp_path)) == figures(folder)


@pytest.mark.parametrize("action", ["kill", "kill in a test"])
@pytest.mark.parametrize("whole", [2], indirect=True)
def test_after_kill_9_and_torchruns_restart_the_run_goes_on_to_the_same_bits(whole, train, action, tmp_path):
    job = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0"}
    statuses, _, err = train(2, tmp_path / "logs", *LINE, environment=job, action=action, rank=1)
    assert statuses == [2, -signal.SIGKILL]
    assert "another process of this run has ended; epoch 0 is safe; resume with" in one_line(err[0])
    statuses, _, err = train(2, tmp_path / "logs", *LINE, environment=job | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert (statuses, err) == ([0, 0], ["", ""])
    assert weights_of(only_run(tmp_path)) == weights_of(whole[1])
    assert figures(only_run(tmp_path)) == figures(whole[1])
    statuses, out, _ = train(2, tmp_path / "logs", *LINE, environment=job | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert statuses == [0, 0]
    assert out[0] == "the run of this job is finished\n"
    only_run(tmp_path)


def test_after_kill_9_of_the_first_process_the_run_goes_on_with_another_number(train, tmp_path):
    statuses, _, err = train(2, tmp_path / "logs", *LINE, action="kill", rank=0)
    assert (statuses, err) == ([-signal.SIGKILL, 2], ["", ""])
    assert run_state(only_run(tmp_path)) is RunState.UNFINISHED
    statuses, _, err = train(3, tmp_path / "logs", "--resume")
    assert (set(statuses), set(err)) == ({0}, {""})
    run = read_run(only_run(tmp_path))
    assert len(run.rows) == 3
    assert any("processes 2 -> 3" in note for note in run.record["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("whole", [2], indirect=True)
def test_kill_9_of_one_process_at_random_moments(whole, tmp_path, pictures):
    """The other one ends by itself; then both go on, to the same bits."""
    rng, killed, number, longest = random.Random(2), 0, 0, 60.0
    while killed < 20:
        logs = tmp_path / str(number)
        states = [run_state(folder) for folder in find_runs(logs)]
        line = ["--resume"] if states else ["--dataset", "folder", "--data-dir", str(pictures), *SMALL, *LINE]
        began = time.monotonic()
        processes = start(2, tmp_path / "processes", program, [*line, "--log-dir", str(logs)])
        victim = processes[rng.randrange(2)]
        victim.join(rng.uniform(0, longest) if number else longest)
        if victim.exitcode is None:
            victim.kill()
            killed += 1
        statuses = wait(processes)
        assert set(statuses) <= {0, 2, -signal.SIGKILL}, statuses
        if statuses == [0, 0] or any(run_state(folder) is RunState.FINISHED for folder in find_runs(logs)):
            [folder] = find_runs(logs)
            assert weights_of(folder) == weights_of(whole[1])
            assert figures(folder) == figures(whole[1])
            number, longest = number + 1, min(longest, time.monotonic() - began)
    assert number > 3


def test_what_goes_wrong_in_another_process_is_told_by_the_first(train, tmp_path):
    statuses, _, err = train(2, tmp_path / "logs", *LINE, action="fail", rank=1)
    assert statuses == [2, 2]
    assert "error: process 1: the lamp is out: change it; epoch 0 is safe" in one_line(err[0])
    assert err[1] == ""


def test_what_goes_wrong_in_all_is_told_once(train, tmp_path):
    statuses, _, err = train(2, tmp_path / "logs", "--batch-size", "1")
    assert statuses == [2, 2]
    assert "--batch-size is 1, but the run has 2 processes" in one_line(err[0])
    assert err[1] == ""


def test_a_teacher_smoothed_labels_and_workers_give_what_they_give_one_process(train, run, tmp_path, monkeypatch):
    assert run("--epochs", "1", "--validation", "9", "--name", "wide", "--width", "2")[0] == 0
    line = ("--epochs", "2", "--validation", "9", "--teacher", "wide", "--label-smoothing", "0.1", "--batches", "workers",
            "--lr", "0.5")
    monkeypatch.setattr(main, "Net", net_without_norms)
    assert run(*line)[0] == 0
    statuses, _, err = train(2, tmp_path / "logs", *line, action="no norms")
    assert (statuses, err) == ([0, 0], ["", ""])
    one, two = ([row | {"seconds": 0} for row in read_run(folder).rows] for folder in find_runs(tmp_path / "logs")[:2])
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)


def test_other_commands_refuse_several_processes(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = command("compare")
    assert status == 2
    assert "torchrun trains one run" in one_line(err)


def test_alone_with_torchruns_variables_it_says_what_it_waits_for_and_can_be_stopped(monkeypatch, pictures, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    stops = (signal.SIGINT, signal.SIGTERM)
    programs = [start_program("--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path),
                              before="from tinycnn.training import distributed; distributed.SILENCE = 0.1\n"
                              f"import atexit, os, signal; signal.alarm({LIMIT})\n"
                              "atexit.register(lambda: print(os.environ['TORCH_CPP_LOG_LEVEL']))") for _ in stops]
    for program, number in zip(programs, stops, strict=True):
        line = program.stderr.readline()
        assert "waiting for the other 1 of 2 processes" in line
        assert "unset WORLD_SIZE" in line
        program.send_signal(number)
        assert program.communicate(timeout=LIMIT) == ("ERROR\n", f"stopped by {number.name}\n")
        assert program.returncode == 128 + number


# ---------------------------------------------------------------- torchrun itself

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.rendezvous = lambda *_, **__: iter([(dist.FileStore({store!r} + attempt, 2), int(os.environ["RANK"]), 2)])
import main
from tinycnn.commands.start import parse_or_exit, run_or_exit
train_epoch, epochs = main.train_epoch, iter(range(100))
def acting(*arguments):
    if next(epochs) == 2 and attempt == "0":
        {action}
    return train_epoch(*arguments)
main.train_epoch = acting
run_or_exit(parse_or_exit(), main.train, main.build, main.train_step)
"""


def torchrun(tmp_path, pictures, action: str, *options: str) -> subprocess.Popen:
    """torchrun with two processes, which do `action` before the third epoch."""
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
