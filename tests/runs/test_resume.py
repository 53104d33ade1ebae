"""Exact resume, and every fault that can end a run: real signals, real kills, real small disks."""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import albumentations as A
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    at_epoch,
    edit,
    example_record,
    example_row,
    figures,
    one_line,
    only_run,
    raising,
    start_program,
    weights_of,
    write_folder,
)
from safetensors.torch import load_file

import main
from config import SETTINGS, Config, UserError, flag
from model import Net
from tinycnn.data.leftovers import DAY
from tinycnn.inference import network
from tinycnn.runs import checkpoint, resuming, weights, writer
from tinycnn.runs.checkpoint import copy_state, make_state, pack, read_newest, unpack
from tinycnn.runs.finding import CHECKPOINT, PREVIOUS_CHECKPOINT, RunState, find_runs, run_state
from tinycnn.runs.record import read_run
from tinycnn.runs.resuming import load_unfinished
from tinycnn.training.errors import StopRequested, as_user_errors, stop_on_signals
from tinycnn.training.metrics import Metrics


@pytest.fixture
def stop_in_epoch(monkeypatch):
    """stop_in_epoch(n): the run that follows is stopped by a real SIGINT in the middle of epoch n."""
    train_epoch = main.train_epoch

    def arrange(number: int):
        calls = iter(range(number, -1, -1))

        def stopped(step, batches, *rest):
            if next(calls, None) == 0:
                train_epoch(step, [next(iter(batches))], *rest)  # some weights have moved
                signal.raise_signal(signal.SIGINT)
            return train_epoch(step, batches, *rest)

        monkeypatch.setattr(main, "train_epoch", stopped)

    return arrange


@pytest.fixture
def uninterrupted(run, tmp_path):
    """The folder of a run of four epochs that nothing disturbed; its logs lie apart."""
    logs = tmp_path / "whole"
    assert run("--epochs", "4", "--dropout", "0.2", "--log-dir", str(logs))[0] == 0
    return find_runs(logs)[0]


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(run, tmp_path, uninterrupted, stop_in_epoch, epoch):
    stop_in_epoch(epoch)
    status, _, err = run("--epochs", "4", "--dropout", "0.2")
    folder = only_run(tmp_path)
    assert status == 130
    assert f"python main.py --resume {folder}" in one_line(err)
    assert len(read_run(folder).rows) == epoch
    assert read_run(folder).summary is None
    status, _, err = run("--resume", "--workers", "2")
    assert (status, err) == (0, "")
    assert only_run(tmp_path) == folder
    assert weights_of(folder) == weights_of(uninterrupted)
    assert figures(folder) == figures(uninterrupted)
    assert (tmp_path / "logs" / "model_accuracy.log").read_bytes() == (folder / "model_accuracy.log").read_bytes()
    assert not any("resumed" in line for line in read_run(folder).comments)


def test_a_run_with_workers_resumes_as_exactly(run, tmp_path, stop_in_epoch):
    config = ("--epochs", "3", "--dropout", "0.2", "--batches", "workers")
    assert run(*config, "--log-dir", str(tmp_path / "whole"))[0] == 0
    stop_in_epoch(1)
    assert run(*config)[0] == 130
    assert run("--resume", "--workers", "2")[0] == 0
    whole, folder = find_runs(tmp_path / "whole")[0], only_run(tmp_path)
    assert weights_of(folder) == weights_of(whole)
    assert figures(folder) == figures(whole)


def test_a_run_that_ended_between_its_last_epoch_and_its_summary_is_finished_by_resume(run, tmp_path, uninterrupted):
    run("--epochs", "4", "--dropout", "0.2")
    folder = only_run(tmp_path)
    for name in ("summary.json", "final.safetensors"):
        (folder / name).unlink()
    assert run("--resume")[0] == 0
    assert weights_of(folder) == weights_of(uninterrupted)
    assert read_run(folder).summary["epochs"] == 4


def test_what_may_change_and_what_may_not(run, tmp_path, stop_in_epoch, pictures, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)  # more threads than cores are told
    stop_in_epoch(1)
    run("--epochs", "2", "--name", "mine")
    name = only_run(tmp_path).name
    before = (only_run(tmp_path) / CHECKPOINT).read_bytes()
    for line, words in ((["--epochs", "5"], "--epochs is 5 on the command line, but run"), (["--lr", "0.02"], "--lr is 0.02"),
                        (["--seed", "1"], "leave --seed out"), (["--dataset", "synthetic"], "--dataset is synthetic"),
                        (["--dataset", "auto", "--batches", "auto", "--capture", "on"], "--capture is on")):
        status, _, err = run("--resume", name, *line)
        assert status == 2
        assert words in one_line(err)
        assert name in err
    other = write_folder(tmp_path / "other", 10, 5)
    status, _, err = run("--resume", name, "--data-dir", str(other))
    assert status == 2
    assert "are not those that run" in one_line(err)
    assert (only_run(tmp_path) / CHECKPOINT).read_bytes() == before
    status, out, err = run("--resume", name, "--epochs", "2", "--threads", "2", "--data-dir", str(pictures))
    assert (status, err) == (0, "")
    assert "the bits may differ" in out
    assert "threads 1 -> 2" in read_run(only_run(tmp_path)).comments[-1]
    status, _, err = run("--resume", name)
    assert "is finished" in one_line(err)


def test_only_what_changes_no_result_may_change(run, tmp_path, stop_in_epoch, monkeypatch):
    stop_in_epoch(1)
    run("--epochs", "2")
    monkeypatch.setattr(resuming, "describe_procedure", dict)
    given, movable, refused = {"log_dir": str(tmp_path / "logs")}, set(), {}
    first = load_unfinished("", given)
    first.lock.close()
    for name, field in SETTINGS.items():
        value, low, choices = getattr(first.config, name), field.metadata["low"], field.metadata["choices"]
        other = (not value if field.type is bool else next(each for each in choices if each not in (value, "auto")) if choices
                 else "cuda" if name == "device" else f"{value}x" if field.type is str
                 else field.type(low if value != low else field.metadata["high"]))
        try:
            found = load_unfinished("", {name: other} | given)
        except UserError as error:
            refused[name] = str(error)
        else:
            found.lock.close()
            assert name == "log_dir" or getattr(found.config, name) == other
            movable.add(name)
    assert all(f"{flag(name)} is " in words for name, words in refused.items())
    assert movable == {"workers", "threads", "device", "instruction_set", "data_dir", "log_dir", "pictures", "tensorboard",
                       "teacher"}  # as README.md says


def test_a_run_of_a_relative_folder_resumes_from_elsewhere(command, pictures, tmp_path, monkeypatch, stop_in_epoch):
    monkeypatch.chdir(pictures.parent)
    stop_in_epoch(1)
    assert command("--dataset", "folder", "--data-dir", pictures.name, "--log-dir", tmp_path / "logs", "--epochs", "2",
                   *SMALL)[0] == 130
    monkeypatch.chdir(tmp_path)
    assert command("--resume", "--log-dir", tmp_path / "logs")[0] == 0


def test_an_edited_network_is_not_filled_with_the_old_weights(run, tmp_path, stop_in_epoch, monkeypatch):
    stop_in_epoch(1)
    run("--epochs", "2")
    monkeypatch.setattr(main, "Net", lambda *_, **__: torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    status, _, err = run("--resume")
    assert status == 2
    assert "began with another network than model.py has now" in one_line(err)


class Zeroed(Net):
    """With an edited initialization."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        torch.nn.init.zeros_(self.head[-1].bias)


def test_a_run_does_not_go_on_with_another_procedure(run, tmp_path, stop_in_epoch, monkeypatch, uninterrupted):
    """Until the edit is undone. It is told before a policy that can't run on whole batches asks for other batches."""
    stop_in_epoch(1)
    run("--epochs", "4", "--dropout", "0.2")
    for name, replacement, words in (
            ("make_policies", lambda *_: {"train": A.Compose([A.Sharpen(p=1)])}, "another augmentation: undo the edits made "
                                                                                  "since in augmentation.py,"),
            ("make_optimizer", lambda net, *_: torch.optim.Adam(net.parameters()), "another training step: undo"),
            ("Net", Zeroed, "another initialization: undo the edits made since in model.py,")):
        with monkeypatch.context() as patch:
            edit(patch, name, replacement)
            status, _, err = run("--resume")
        assert status == 2
        assert words in one_line(err)
    assert run("--resume")[0] == 0
    assert weights_of(only_run(tmp_path)) == weights_of(uninterrupted)


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adafactor])
def test_a_run_with_another_optimizer_resumes_exactly(run, tmp_path, stop_in_epoch, monkeypatch, optimizer):
    """Also where its state has other shapes than the weights."""
    edit(monkeypatch, "make_optimizer", lambda net, config, device: optimizer(net.parameters(), lr=config.lr))
    assert run("--epochs", "2", "--log-dir", tmp_path / "whole")[0] == 0
    stop_in_epoch(1)
    assert run("--epochs", "2")[0] == 130
    assert run("--resume")[0] == 0
    assert weights_of(only_run(tmp_path)) == weights_of(find_runs(tmp_path / "whole")[0])


def test_a_run_with_a_negative_loss_and_masks_resumes_and_is_used(run, command, tmp_path, stop_in_epoch, monkeypatch):
    class Masked(Net):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
            self.register_buffer("bytes", torch.ones(2, dtype=torch.uint8))

    for module in (main, network):
        monkeypatch.setattr(module, "Net", Masked)
    add = Metrics.add
    monkeypatch.setattr(Metrics, "add", lambda self, loss, *given: add(self, loss - 5, *given))
    stop_in_epoch(1)
    assert run("--epochs", "2")[0] == 130
    assert run("--resume")[0] == 0
    folder = only_run(tmp_path)
    assert read_run(folder).rows[-1]["train_loss"] < 0
    assert command("test", folder, "--device", "cpu")[0] == 0


def test_the_model_file_of_a_run_is_the_one_that_was_imported(tmp_path, monkeypatch):
    """A user may edit it while the runs of a sweep are made."""
    assert (ROOT / "model.py").read_bytes() == writer.MODEL_SOURCE
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    net = torch.nn.Linear(1, 1)
    run = writer.start_run(Config(log_dir=str(tmp_path)), example_record(), net, torch.optim.SGD(net.parameters()))
    monkeypatch.undo()
    assert (run.folder / "model.py").read_bytes() == writer.MODEL_SOURCE


def test_a_new_run_is_locked_while_it_trains(run, tmp_path, monkeypatch):
    seen = []
    at_epoch(monkeypatch, 0, lambda: seen.append(subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; from tinycnn.runs.files import lock_file\n"
         "print(lock_file(Path(sys.argv[1])) is None)", only_run(tmp_path) / ".lock"], cwd=ROOT, capture_output=True,
        text=True).stdout))
    assert run("--epochs", "1")[0] == 0
    assert seen == ["True\n"]


def test_a_running_run_is_not_resumed(run, tmp_path, stop_in_epoch):
    stop_in_epoch(0)
    run("--epochs", "2")
    held = start_program("--resume", "--log-dir", str(tmp_path / "logs"), before="import time\n"
                 "main.train_epoch = lambda *_: (print('in', flush=True), time.sleep(600))")
    try:
        while held.stdout.readline() != "in\n":
            assert held.poll() is None
        status, _, err = run("--resume")
        assert status == 2
        assert "is still running" in one_line(err)
    finally:
        held.kill()
        held.wait()
    assert run("--resume")[0] == 0


# ---------------------------------------------------------------- damage

def damages(whole: bytes, path: Path):
    """(name, content) of every kind of damage to the checkpoint file `whole`."""
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {path}",)

    buffer = io.BytesIO()
    torch.save({"net": Malicious()}, buffer)
    evil = [pickle.dumps(Malicious()), buffer.getvalue()]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    yield "empty", b""
    yield "truncated", whole[:len(whole) // 2]
    yield "flipped", bytes(flipped)
    yield "zeros", bytes(len(whole))
    for number, content in enumerate(evil):  # with the right checksum: who can write the file can write that too
        yield f"malicious{number}", content + hashlib.sha256(content).digest()
    yield "foreign", pack({"weights": torch.zeros(3)})


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_used(run, tmp_path, monkeypatch, uninterrupted, stop_in_epoch):
    monkeypatch.setattr(writer, "INTERVAL", 0.0)
    stop_in_epoch(3)
    run("--epochs", "4", "--dropout", "0.2")
    folder, trap = only_run(tmp_path), tmp_path / "trap"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for kind, content in damages(whole[CHECKPOINT], trap):
        (folder / CHECKPOINT).write_bytes(content)
        (folder / PREVIOUS_CHECKPOINT).write_bytes(content)
        status, _, err = run("--resume")
        assert status == 2, kind
        assert f"{CHECKPOINT} " in one_line(err)
        assert f"{PREVIOUS_CHECKPOINT} " in err
        assert (folder / CHECKPOINT).read_bytes() == (folder / PREVIOUS_CHECKPOINT).read_bytes() == content

        (folder / PREVIOUS_CHECKPOINT).write_bytes(whole[PREVIOUS_CHECKPOINT])
        status, out, err = run("--resume")
        assert (status, err) == (0, ""), kind
        assert f"went on from {PREVIOUS_CHECKPOINT}" in out
        assert any(CHECKPOINT in line for line in read_run(folder).comments)
        assert weights_of(folder) == weights_of(uninterrupted), kind
        assert figures(folder) == figures(uninterrupted)
        for path in folder.iterdir():
            path.unlink()
        for name, data in whole.items():
            (folder / name).write_bytes(data)
    assert not trap.exists()


def test_a_damaged_checkpoint_displaces_no_other_and_stays_in_the_notes(run, tmp_path, monkeypatch, stop_in_epoch):
    monkeypatch.setattr(writer, "INTERVAL", 0.0)
    stop_in_epoch(2)
    assert run("--epochs", "3")[0] == 130
    folder = only_run(tmp_path)
    (folder / CHECKPOINT).write_bytes(b"damaged")
    stop_in_epoch(1)  # after one more
    assert run("--resume")[0] == 130
    assert (folder / "checkpoint.damaged.pt").read_bytes() == b"damaged"
    assert len(unpack(folder / CHECKPOINT)["rows"]) == 2
    assert len(unpack(folder / PREVIOUS_CHECKPOINT)["rows"]) == 1
    assert run("--resume")[0] == 0
    assert any("went on from checkpoint.previous.pt" in line for line in read_run(folder).comments)


@pytest.mark.parametrize("formats", [(torch.channels_last, torch.contiguous_format),
                                     (torch.contiguous_format, torch.channels_last)])
def test_momentum_takes_the_memory_format_of_the_device_that_resumes(formats):
    """GPUs differ in it, and a fused optimizer refuses momentum that lies otherwise than the weights."""
    before, after = (Net().to(memory_format=format) for format in formats)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (before, after)]
    before(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizers[0].step()
    writer._load_optimizer_state(optimizers[1], optimizers[0].state_dict()["state"])
    for weight, other in zip(before.parameters(), after.parameters(), strict=True):
        momentum = optimizers[1].state[other]["momentum_buffer"]
        assert momentum.stride() == other.stride()
        assert torch.equal(momentum, optimizers[0].state[weight]["momentum_buffer"])


def test_a_copy_of_a_state_shares_no_memory_with_it_and_keeps_what_is_shared_within(tmp_path):
    net = torch.nn.Sequential(Net(), torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    net = net.to(memory_format=torch.channels_last)
    net[2].weight = net[1].weight
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = make_state(net, optimizer, [example_row(0)], example_record(), {})
    with mock.patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copies:
        before, copied = pack(state), copy_state(state)
    dtypes = [{tensor.dtype for tensor in call.args[1]} for call in copies.call_args_list]
    assert sorted(map(str, dtypes)) == ["{torch.float32}", "{torch.int64}"]  # CUDA needs few kernels for one dtype only
    assert len(pack(copied)) <= len(before)
    assert [tensor.stride() for tensor in copied["net"].values()] == [tensor.stride() for tensor in state["net"].values()]
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    state["rows"].append(example_row(1))
    for path, now in ((tmp_path / "then", before), (tmp_path / "copied", pack(copied))):
        path.write_bytes(now)
    then, found = (unpack(path) for path in (tmp_path / "then", tmp_path / "copied"))
    assert found["rows"] == then["rows"] == [example_row(0)]
    for one, other in ((then["net"], found["net"]), *zip(*(each["optimizer"]["state"].values() for each in (then, found)),
                                                         strict=True)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert found["net"]["1.weight"].data_ptr() == found["net"]["2.weight"].data_ptr()


def test_a_crash_between_the_two_renames_loses_nothing(run, tmp_path, uninterrupted, stop_in_epoch):
    stop_in_epoch(2)
    run("--epochs", "4", "--dropout", "0.2")
    folder = only_run(tmp_path)
    (folder / CHECKPOINT).rename(folder / PREVIOUS_CHECKPOINT)
    (folder / ".tmp-123-checkpoint.pt").write_bytes(b"half")
    (folder / ".mine").mkdir()
    assert run("--resume")[0] == 0
    assert weights_of(folder) == weights_of(uninterrupted)
    assert [path.name for path in folder.glob(".*")] in ([".lock", ".mine"], [".mine", ".lock"])


def test_a_log_is_never_ahead_of_the_checkpoint(run, tmp_path, monkeypatch):
    def disk_gone():
        monkeypatch.setattr(writer, "write_checkpoint", lambda *_: raising(UserError("full"))())
        raise KeyboardInterrupt

    at_epoch(monkeypatch, 2, disk_gone)  # two epochs, of which no checkpoint was due yet
    assert run("--epochs", "4")[0] == 130
    assert read_run(only_run(tmp_path)).rows == read_newest(only_run(tmp_path))[0]["rows"] == []


KILL = """
import os, signal
replace, calls = os.replace, []
def killing(one, other):
    calls.append(os.path.basename(other))
    if calls[-1] == {name!r} and calls.count({name!r}) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(one, other)
os.replace = killing
"""


@pytest.mark.parametrize(("name", "number"), [(CHECKPOINT, 3), ("final.safetensors", 1)])
def test_kill_9_before_a_rename_loses_nothing(run, pictures, tmp_path, name, number):
    whole = tmp_path / "whole"
    assert run("--epochs", "3", "--log-dir", whole)[0] == 0
    process = start_program("--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"),
                            "--epochs", "3", *SMALL, interval=0, before=KILL.format(name=name, number=number))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert read_run(only_run(tmp_path)).summary is None
    assert run("--resume")[0] == 0
    assert weights_of(only_run(tmp_path)) == weights_of(find_runs(whole)[0])


def test_the_renames_of_a_checkpoint_reach_the_disk(tmp_path, monkeypatch):
    checkpoint.write_checkpoint(tmp_path, {})
    events, replace = [], os.replace
    monkeypatch.setattr(checkpoint.os, "replace", lambda one, other: (events.append(Path(other).name), replace(one, other)))
    monkeypatch.setattr(checkpoint, "sync_folder", lambda folder: events.append("on disk"))
    checkpoint.write_checkpoint(tmp_path, {})
    assert events[-3:] == [PREVIOUS_CHECKPOINT, CHECKPOINT, "on disk"]


def test_a_new_run_removes_leftovers(run, tmp_path):
    old = tmp_path / "logs" / "runs" / ".new-1"
    old.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * DAY,) * 2)
    assert run("--epochs", "1")[0] == 0
    assert not old.exists()


@pytest.mark.parametrize("change", [
    lambda state: state["net"]["head.1.bias"].fill_(torch.nan),
    lambda state: state["best"]["net"].update({"head.1.bias": torch.zeros(2)})])
def test_values_that_load_but_are_no_weights_are_named(run, tmp_path, stop_in_epoch, change):
    stop_in_epoch(1)
    assert run("--epochs", "2", "--validation", "9")[0] == 130
    state = unpack(only_run(tmp_path) / CHECKPOINT)
    change(state)
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        (only_run(tmp_path) / name).write_bytes(pack(state))
    status, _, err = run("--resume")
    assert status == 2
    assert "can't be resumed" in one_line(err)


def test_epochs_of_four_seconds_are_written_every_third_time_and_at_the_end(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    monkeypatch.setattr(writer, "make_run_folder", lambda *_: tmp_path)
    net = torch.nn.Linear(1, 1)
    run = writer.start_run(Config(log_dir=str(tmp_path)), example_record(), net, torch.optim.SGD(net.parameters()))
    in_file = []
    for epoch in range(8):
        now += 4
        run.save_epoch(example_row(epoch), last=epoch == 7)
        in_file.append(len(unpack(tmp_path / CHECKPOINT)["rows"]) if (tmp_path / CHECKPOINT).exists() else 0)
    assert in_file == [0, 0, 3, 3, 3, 6, 6, 8]
    assert len(unpack(tmp_path / PREVIOUS_CHECKPOINT)["rows"]) == 6


def test_the_best_weights_belong_to_an_epoch_of_the_newest_checkpoint(tmp_path, monkeypatch):
    """Checkpoints are rate-limited: an epoch may be the best, and lost in a kill before the next checkpoint."""
    now = 0.0
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters())
    run = writer.start_run(Config(log_dir=str(tmp_path), validation=2), example_record(validation=2), net, optimizer)

    def epoch(number: int, accuracy: float):
        torch.nn.init.constant_(net.weight, number)
        run.save_epoch(example_row(number) | {"val_loss": 1.0, "val_acc": accuracy}, last=False)

    def best() -> float:
        return load_file(run.folder / "best.safetensors")["weight"].item()

    now = 100.0
    epoch(1 - 1, 50.0)
    epoch(1, 50.0)  # as good is not better
    assert run.best["epoch"] == 0
    assert best() == 0
    epoch(2, 60.0)  # no checkpoint is due: a kill now loses this epoch
    assert best() == 0
    assert len(unpack(run.folder / CHECKPOINT)["rows"]) == 1
    now = 200.0
    epoch(3, 10.0)
    assert best() == 2
    assert unpack(run.folder / CHECKPOINT)["best"]["epoch"] == 2
    run.lock.close()
    (run.folder / "best.safetensors").unlink()  # a kill between the checkpoint and the best weights
    unfinished = load_unfinished(run.folder.name, {"log_dir": str(tmp_path)})
    resumed = writer.resume_run(unfinished, unfinished.config, example_record(validation=2), net, optimizer)
    resumed.start_log("")
    assert best() == 2


def test_best_weights_survive_a_crash_right_after_their_epoch(run, tmp_path, monkeypatch):
    save_epoch = writer.RunWriter.save_epoch

    def crash(self, row, last):
        line = save_epoch(self, row, last)
        if len(self.rows) == 1:
            signal.raise_signal(signal.SIGTERM)
        return line

    assert run("--epochs", "3", "--validation", "9", "--log-dir", str(tmp_path / "whole"))[0] == 0
    monkeypatch.setattr(writer.RunWriter, "save_epoch", crash)
    assert run("--epochs", "3", "--validation", "9")[0] == 143
    assert run("--resume")[0] == 0
    for name in ("best.safetensors", "final.safetensors"):
        assert (only_run(tmp_path) / name).read_bytes() == (find_runs(tmp_path / "whole")[0] / name).read_bytes()


def test_a_run_named_by_its_path_keeps_its_copies_above_it(run, command, tmp_path, stop_in_epoch, monkeypatch):
    stop_in_epoch(0)
    run("--epochs", "1")
    folder = only_run(tmp_path)
    monkeypatch.chdir(folder.parent)
    assert command("--resume", folder.name)[0] == 0
    assert (tmp_path / "logs" / "model_accuracy.log").read_bytes() == (folder / "model_accuracy.log").read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (tmp_path / "some").mkdir()
    assert command("--resume", tmp_path / "some")[0] == 2
    assert not list((tmp_path / "some").iterdir())


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\udcffb"])
def test_a_renamed_run_keeps_a_log_of_whole_lines(run, tmp_path, stop_in_epoch, name):
    stop_in_epoch(1)
    run("--epochs", "2")
    only_run(tmp_path).rename(tmp_path / "logs" / "runs" / name)
    assert run("--resume")[0] == 0
    assert len(read_run(only_run(tmp_path)).rows) == 2
    assert read_run(only_run(tmp_path)).comments[0].isprintable()


@pytest.mark.parametrize("change", [
    lambda state: state["net"].update(x=torch.zeros(2).to(torch.float8_e4m3fn)),
    lambda state: state["record"]["config"].update({1: "x"}),
    lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(()))])
def test_odd_values_under_a_right_checksum_are_one_line(run, tmp_path, stop_in_epoch, change):
    stop_in_epoch(1)
    run("--epochs", "2")
    folder = only_run(tmp_path)
    state = unpack(folder / CHECKPOINT)
    change(state)
    for checkpoint_name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        (folder / checkpoint_name).write_bytes(pack(state))
    status, _, err = run("--resume")
    assert status == 2
    one_line(err)


def test_users_can_torch_load_a_checkpoint(run, tmp_path):
    run("--epochs", "1")
    state = torch.load(only_run(tmp_path) / CHECKPOINT, weights_only=True)
    assert len(state["rows"]) == 1
    assert set(state) == checkpoint.KEYS


def mutated(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if kind == 3:
        return data[:at] + rng.randbytes(min(16, len(data) - at)) + data[at + 16:]
    return data[:at] + data[at + rng.randrange(1, 100):]


def test_fuzz_of_checkpoint_config_and_log(run, tmp_path, monkeypatch, stop_in_epoch):
    """1,400 random mutations: never anything but a UserError, never a state that is not the saved one."""
    monkeypatch.setattr(writer, "INTERVAL", 0.0)
    stop_in_epoch(2)
    run("--epochs", "3")
    folder, rng = only_run(tmp_path), random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in (CHECKPOINT, "config.json", "model_accuracy.log")}
    (folder / PREVIOUS_CHECKPOINT).unlink()
    for _ in range(40):
        content = mutated(whole[CHECKPOINT], rng)
        (folder / CHECKPOINT).write_bytes(content)
        if content != whole[CHECKPOINT]:
            with pytest.raises(UserError):
                read_newest(folder)
    for _ in range(60):  # with the right checksum, as who can write the file can write that
        content = mutated(whole[CHECKPOINT][:-checkpoint.DIGEST], rng)
        (folder / CHECKPOINT).write_bytes(content + hashlib.sha256(content).digest())
        with contextlib.suppress(UserError):
            read_newest(folder)
    (folder / CHECKPOINT).write_bytes(whole[CHECKPOINT])
    for name in ("config.json", "model_accuracy.log"):
        for _ in range(40):
            (folder / name).write_bytes(mutated(whole[name], rng))
            with contextlib.suppress(UserError):
                read_run(folder)
            if rng.random() < 0.05:
                resumed = load_unfinished("", {"log_dir": str(tmp_path / "logs")})  # looks at neither file
                assert len(resumed.state["rows"]) == 2
                resumed.lock.close()
        (folder / name).write_bytes(whole[name])
    assert len(unpack(folder / CHECKPOINT)["rows"]) == 2


def subtrees(value, path=()):
    """The paths of everything inside nested dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from subtrees(value[key], (*path, key))


def test_wrong_values_under_a_right_checksum_are_never_a_traceback_in_training(run, tmp_path, stop_in_epoch, pictures):
    """100 checkpoints with a value of another type, shape or range: refused, or a run that goes on."""
    stop_in_epoch(2)
    run("--epochs", "3", "--validation", "9")
    folder, rng = only_run(tmp_path), random.Random(0)
    state = unpack(folder / CHECKPOINT)
    record, paths = state["record"], list(subtrees(state))
    (folder / PREVIOUS_CHECKPOINT).unlink()
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    refused = 0
    for number in range(100):
        (*place, key) = paths[rng.randrange(len(paths))]
        changed = copy.deepcopy(state)
        inner = changed
        for part in place:
            inner = inner[part]
        inner[key] = rng.choice([None, "x", -1, 3.5, True, [], {}, torch.zeros(3), float("nan"), [[]], {"a": []}])
        (folder / CHECKPOINT).write_bytes(pack(changed))
        net = Net(num_classes=3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        try:
            unfinished = load_unfinished("", {"log_dir": str(tmp_path / "logs")})
            try:
                resumed = writer.resume_run(unfinished, unfinished.config, record, net, optimizer)
                if number % 5 == 0:
                    net(images).sum().backward()
                    optimizer.step()
                    resumed.log.text()
            finally:
                unfinished.lock.close()
        except UserError:
            refused += 1
            for left in folder.glob("checkpoint.damaged.pt"):
                left.unlink()
    assert refused > 50


# ---------------------------------------------------------------- signals

def started(pictures: Path, logs: Path, *more: str) -> subprocess.Popen:
    """A long run in a process of its own with two workers, past its second epoch."""
    process = start_program("--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(logs), "--epochs", "100000",
                    *SMALL, "--batches", "workers", "--workers", "2", *more)
    wait_for_epoch(process, 1)
    return process


def wait_until(process: subprocess.Popen, seen) -> None:
    """Read the process's output up to the line that `seen` is true of."""
    while not seen(line := process.stdout.readline()):
        assert line, process.stderr.read()


def wait_for_epoch(process: subprocess.Popen, epoch: int) -> None:
    wait_until(process, lambda line: line.split()[:1] == [str(epoch)])


def children(pid: int) -> list[int]:
    """The workers of a process: those below it that have no children, without multiprocessing's helper."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    below, found = {pid}, []
    while new := {child for child, parent in parents.items() if parent in below} - below:
        below |= new
    for child in sorted(below - set(parents.values()) - {pid}):
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_everything_saved(pictures, tmp_path, number, status):
    process = started(pictures, tmp_path)
    workers = [pid for pid in children(process.pid) if alive(pid)]
    assert len(workers) >= 2
    os.killpg(process.pid, number)  # as a terminal does: to the workers too
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    (folder,) = find_runs(tmp_path)
    assert f"stopped by {number.name}; epochs 0 to " in one_line(err)
    assert f"--resume {folder}\n" in err
    rows = read_run(folder).rows
    saved = read_newest(folder)[0]
    assert len(rows) == len(saved["rows"]) >= 2
    assert not any(alive(pid) for pid in workers)


def test_a_second_signal_ends_it_at_once(pictures, tmp_path):
    process = start_program("--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path), "--epochs", "9",
                            *SMALL, before="from tinycnn.runs.writer import RunWriter; import time\n"
                           "RunWriter._rescue = lambda *_: (print('rescuing', flush=True), time.sleep(600))")
    wait_for_epoch(process, 0)
    process.send_signal(signal.SIGTERM)
    while process.stdout.readline() != "rescuing\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def kill_and_resume(arguments: list[str], logs: Path, kills: int, longest: float, seed: int, interval: float | None) -> int:
    """kill -9 a run at random moments and resume it each time, until it was hit `kills` times; then let it end. A run that
    ends before is followed by another. Returns the number of epochs that resumed runs began at, added up."""
    rng, hits, taken_up = random.Random(seed), 0, 0
    while hits < kills or any(run_state(run) is RunState.UNFINISHED for run in find_runs(logs)):
        unfinished = [run for run in find_runs(logs) if run_state(run) is RunState.UNFINISHED]
        if unfinished:
            taken_up += len(read_newest(unfinished[0])[0]["rows"])
        process = start_program(*(["--resume", "--log-dir", str(logs)] if unfinished else arguments), interval=interval)
        if rng.random() < 0.9:  # the others are killed while they start
            wait_until(process, lambda line: line.split()[:1] == ["epoch"])
        try:
            _, err = process.communicate(timeout=rng.uniform(0, longest) if hits < kills else None)
            assert process.returncode == 0, err
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            hits += 1
    return taken_up


def assert_killed_runs_equal(uninterrupted: Path, logs: Path) -> None:
    assert find_runs(logs)
    for folder in find_runs(logs):
        assert weights_of(folder) == weights_of(uninterrupted)
        assert figures(folder) == figures(uninterrupted)


@pytest.mark.slow
def test_kill_9_at_50_random_moments(tmp_path):
    """Eight epochs on the built-in set, killed 50 times."""
    arguments = ["--dataset", "synthetic", "--epochs", "8"]
    whole = start_program(*arguments, "--log-dir", str(tmp_path / "whole"))
    assert whole.wait() == 0
    an_epoch = read_run(find_runs(tmp_path / "whole")[0]).rows[-1]["seconds"]
    taken_up = kill_and_resume([*arguments, "--log-dir", str(tmp_path / "killed")], tmp_path / "killed", 50,
                               2 * an_epoch, 2, 0.0)
    assert taken_up > 50  # most resumed in the middle, not at the beginning
    assert_killed_runs_equal(find_runs(tmp_path / "whole")[0], tmp_path / "killed")


@pytest.mark.slow
def test_kill_9_on_cifar10(cifar10, tmp_path):
    """Two epochs of the real thing, killed three times."""
    arguments = ["--dataset", "cifar10", "--data-dir", str(cifar10), "--epochs", "2"]
    whole = start_program(*arguments, "--log-dir", str(tmp_path / "whole"))
    assert whole.wait() == 0
    took = sum(row["seconds"] for row in read_run(find_runs(tmp_path / "whole")[0]).rows)
    kill_and_resume([*arguments, "--log-dir", str(tmp_path / "killed")], tmp_path / "killed", 3, took, 3, None)
    assert_killed_runs_equal(find_runs(tmp_path / "whole")[0], tmp_path / "killed")


# ---------------------------------------------------------------- faults

def test_a_killed_worker_is_named(pictures, tmp_path):
    process = started(pictures, tmp_path)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "a worker process was killed" in one_line(err)
    assert "epochs 0 to" in err
    assert "--resume" in err
    (folder,) = find_runs(tmp_path)
    assert len(read_newest(folder)[0]["rows"]) == len(read_run(folder).rows) >= 2


def test_what_ends_a_run_from_outside_is_named(run, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 2, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    status, _, err = run("--epochs", "4")
    assert status == 2
    assert "out of GPU memory: close other" in one_line(err)
    assert "epochs 0 to 1 are safe; resume with: python main.py --resume" in err
    assert run("--resume")[0] == 0


def test_a_loss_that_turns_nan_is_named(run, tmp_path, monkeypatch):
    train_epoch, calls = main.train_epoch, iter(range(10))

    def poisoned(step, *rest):
        if next(calls) == 1:
            with torch.no_grad():
                next(step.net.parameters()).fill_(torch.nan)
        return train_epoch(step, *rest)

    monkeypatch.setattr(main, "train_epoch", poisoned)
    status, _, err = run("--epochs", "3")
    assert status == 2
    assert "the loss became nan" in one_line(err)
    assert "epoch 0 is safe" in err
    assert len(read_newest(only_run(tmp_path))[0]["rows"]) == 1
    status, _, err = run("--resume")
    assert status == 2
    assert "there is no unfinished run" in one_line(err)  # but what would diverge again


def test_other_runtime_errors_are_bugs():
    with pytest.raises(RuntimeError, match="shape"), as_user_errors():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0: shape")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    while subprocess.run(["umount", "-l", disk], capture_output=True).returncode == 0:  # a test may have mounted it again
        pass


def test_a_full_disk(run, small_disk, monkeypatch, uninterrupted):
    monkeypatch.setattr(writer, "INTERVAL", 0.0)
    filler = small_disk / "filler"
    at_epoch(monkeypatch, 2, lambda: filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000)))
    status, _, err = run("--epochs", "4", "--dropout", "0.2", "--log-dir", str(small_disk))
    assert status == 2
    assert "could not be written (No space left on device): make room" in one_line(err)
    assert "epochs 0 to 1 are safe; resume with" in err
    (folder,) = find_runs(small_disk)
    assert {path.name for path in folder.iterdir()} == {
        ".lock", CHECKPOINT, PREVIOUS_CHECKPOINT, "config.json", "model.py", "model_accuracy.log", "torch_summary.log"}
    filler.unlink()
    assert run("--resume", "--log-dir", str(small_disk))[0] == 0
    assert weights_of(folder) == weights_of(uninterrupted)
    assert figures(folder) == figures(uninterrupted)


def test_a_limit_to_the_size_of_files_is_as_a_full_disk(run, tmp_path, monkeypatch):
    """Which needs no right to mount a small one."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(writer, "INTERVAL", 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_epoch(monkeypatch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1])))
    try:
        status, _, err = run("--epochs", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert "could not be written (File too large): make room" in one_line(err)
    assert "epochs 0 to 1 are safe; resume with" in err
    assert not list(only_run(tmp_path).glob(".tmp*"))
    assert run("--resume")[0] == 0


def test_no_room_for_a_run_at_all(run, small_disk):
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    status, _, err = run("--epochs", "1", "--log-dir", str(small_disk))
    assert status == 2
    assert "No space left on device" in one_line(err)
    assert not list((small_disk / "runs").iterdir())


def test_a_log_folder_that_becomes_read_only(run, small_disk, monkeypatch, uninterrupted):
    def make_read_only():
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", small_disk], check=True)

    at_epoch(monkeypatch, 1, make_read_only)
    status, _, err = run("--epochs", "4", "--dropout", "0.2", "--log-dir", str(small_disk))
    assert status == 2
    assert "could not be written (Read-only file system): make room, give write permission" in one_line(err)
    assert "--resume" in err
    subprocess.run(["umount", small_disk], check=True)
    assert run("--resume", "--log-dir", str(small_disk))[0] == 0
    assert weights_of(find_runs(small_disk)[0]) == weights_of(uninterrupted)


def test_two_runs_at_once_never_mix(pictures, tmp_path):
    arguments = ["--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path), "--epochs", "3", *SMALL]
    both = [start_program(*arguments, "--seed", str(seed)) for seed in (0, 1)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    runs = [read_run(folder) for folder in find_runs(tmp_path)]
    assert sorted(run.record["config"]["seed"] for run in runs) == [0, 1]
    copy = (tmp_path / "model_accuracy.log").read_text()
    assert copy in [(run.folder / "model_accuracy.log").read_text() for run in runs]


def test_a_checkpoint_of_another_version_is_refused(run, tmp_path, stop_in_epoch):
    stop_in_epoch(1)
    run("--epochs", "2")
    folder = only_run(tmp_path)
    state = unpack(folder / CHECKPOINT)
    state["record"]["config"]["colour"] = "blue"
    (folder / CHECKPOINT).write_bytes(pack(state))
    status, _, err = run("--resume")
    assert status == 2
    assert "another version of this program" in one_line(err)


def test_config_json_is_what_the_checkpoint_says(run, tmp_path):
    run("--epochs", "1")
    folder = only_run(tmp_path)
    assert json.loads((folder / "config.json").read_text()) == unpack(folder / CHECKPOINT)["record"]


def test_the_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested), stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before



def test_checkpoints_weights_and_summary_reach_the_disk_before_they_count(run, monkeypatch):
    durable = {}
    for module in (checkpoint, writer, weights):
        def recorded(path, data, durable_write=False, write=module.write, **named):
            durable.setdefault(path.name, set()).add(bool(named.get("durable", durable_write)))
            write(path, data, named.get("durable", durable_write))

        monkeypatch.setattr(module, "write", recorded)
    assert run("--epochs", "1")[0] == 0
    assert durable[".tmp-checkpoint.pt"] == durable["summary.json"] == durable["final.safetensors"] == {True}
