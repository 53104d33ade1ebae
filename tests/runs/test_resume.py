"""Exact resume, and every fault that can end a run: real signals, real kills, real small disks."""

import contextlib
import copy
import hashlib
import io
import itertools
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
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    at_epoch,
    example_inputs,
    example_row,
    figures,
    one_line,
    only_run,
    raising,
    run_line,
    start_program,
    write_folder,
)
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

import main
from config import SETTINGS, UserError, flag
from model import Net
from tinycnn.data.leftovers import DAY
from tinycnn.errors import StopRequested, stop_on_signals
from tinycnn.runs import checkpoint
from tinycnn.runs import run as run_module
from tinycnn.runs import weights as weights_module
from tinycnn.runs.checkpoint import load_states, pack, read_newest, unpack, write_checkpoint
from tinycnn.runs.finding import CHECKPOINT, PREVIOUS_CHECKPOINT, RunState, find_runs, run_state
from tinycnn.runs.record import BEST, FINAL, SUMMARY, read_run
from tinycnn.runs.run import Run


@pytest.fixture
def stop_in_epoch(monkeypatch):
    """stop_in_epoch(n): the run that follows is stopped by a real SIGINT in the middle of epoch n."""
    train_epoch = main.train_epoch

    def arrange(number: int):
        calls = iter(range(number, -1, -1))

        def stopped(step, net, batches, scheduler):
            if next(calls, None) == 0:
                train_epoch(step, net, itertools.islice(batches, 1), scheduler)  # some weights and the rate have moved
                signal.raise_signal(signal.SIGINT)
            return train_epoch(step, net, batches, scheduler)

        monkeypatch.setattr(main, "train_epoch", stopped)
        monkeypatch.setattr(main, "progress", lambda batches, sums: batches)  # which has no length here

    return arrange


@pytest.fixture
def every_epoch(monkeypatch):
    """Checkpoints after every epoch, not every ten seconds."""
    monkeypatch.setattr(run_module, "INTERVAL", 0.0)


def loaded(tmp_path: Path, **given) -> Run:
    """The unfinished run in tmp_path/logs, locked while the object is there."""
    return Run.resume("", {"log_dir": str(tmp_path / "logs")} | given)


def assert_same_runs(one: Path, other: Path) -> None:
    for name in (FINAL, BEST):
        assert (one / name).exists() == (other / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (other / name).read_bytes(), name
    assert figures(one) == figures(other)


# ---------------------------------------------------------------- exact resume

def exponential(optimizer, config, steps):
    return lr_scheduler.ExponentialLR(optimizer, 0.5)


def restarts(optimizer, config, steps):
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.PolynomialLR(optimizer, 2), lr_scheduler.ExponentialLR(
        optimizer, 0.5)], [2])


@pytest.mark.parametrize(("stop", "settings", "edits"), [
    (1, "--epochs 3 --schedule one-cycle --dropout 0.2 --validation 9", {}),
    (2, "--epochs 4 --warmup 3 --batches workers --crop-size 24 --whole-images-share 0.5", {}),
    (0, "--epochs 1 --nesterov", {}),
    (1, "--epochs 3", {"make_scheduler": exponential, "SGD": lambda parameters, lr, **_: torch.optim.AdamW(parameters, lr)}),
    # whose state has other shapes than the weights
    (1, "--epochs 3", {"make_scheduler": restarts, "SGD": lambda parameters, lr, **_: torch.optim.Adafactor(parameters, lr)})])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(run, tmp_path, stop_in_epoch, monkeypatch, stop, settings, edits):
    seen, train_step = [], main.train_step

    def noting(net, optimizer, criterion, images, labels):
        seen.append((optimizer.param_groups[0]["lr"], images.shape[-1]))
        return train_step(net, optimizer, criterion, images, labels)

    for name, replacement in ({"train_step": noting} | edits).items():
        monkeypatch.setattr(main, name, replacement)
    settings = settings.split()
    assert run(*settings, "--log-dir", tmp_path / "whole")[0] == 0
    (whole,), expected = find_runs(tmp_path / "whole"), seen[:]
    stop_in_epoch(stop)
    status, _, err = run(*settings)
    folder = only_run(tmp_path)
    assert status == 130
    assert f"resume with: python main.py --resume {folder}\n" in one_line(err)
    rows = read_run(folder).rows
    assert len(rows) == stop
    assert read_run(folder).summary is None
    seen.clear()
    status, _, err = run("--resume", "--workers", "1")
    assert (status, err) == (0, "")
    assert_same_runs(folder, whole)
    assert seen == expected[-len(seen):]  # each step's rate, and size of images
    assert len(seen) == 3 * (int(settings[1]) - stop)
    if "one-cycle" in settings:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
        torchs = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=9, cycle_momentum=False, final_div_factor=400)
        for rate, _ in expected:
            assert rate == optimizer.param_groups[0]["lr"]
            optimizer.step()
            torchs.step()
    if "--crop-size" in settings:
        assert [side for _, side in expected] == [24] * 6 + [32] * 6
    found = read_run(folder)
    assert found.record["number"] == 1  # it is the same run
    assert not any("resumed" in line for line in found.comments)
    assert found.record == unpack(folder / CHECKPOINT)["record"]
    for name in ("model_accuracy.log", "torch_summary.log"):
        assert (tmp_path / "logs" / name).read_bytes() == (folder / name).read_bytes()
    assert [path.name for path in folder.glob(".*")] == [".lock"]


def test_kill_9_before_any_rename_loses_nothing(run, tmp_path, monkeypatch, every_epoch):
    """What is on disk before each rename of the second epoch, and of the end, is what a kill leaves there: a run goes on from
    each."""
    replace, watched, left = os.replace, (CHECKPOINT, PREVIOUS_CHECKPOINT, f".tmp-{CHECKPOINT}", BEST, FINAL, SUMMARY), []

    def replacing(one, other):
        folder = Path(other).parent
        if Path(other).name in watched and not folder.name.startswith("."):
            left.append(Path(other).name)
            shutil.copytree(folder, tmp_path / "left" / str(len(left)))
        replace(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        assert run("--epochs", "2", "--validation", "9", "--dropout", "0.2", "--schedule", "step")[0] == 0
    each = [f".tmp-{CHECKPOINT}", PREVIOUS_CHECKPOINT, CHECKPOINT, BEST]
    assert left == [*each, *each, FINAL, SUMMARY]
    folder, whole = only_run(tmp_path), tmp_path / "whole"
    shutil.copytree(folder, whole)
    for number in range(len(each) + 1, len(left) + 1):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "left" / str(number), folder)
        (folder / ".mine").mkdir()
        assert run("--resume")[0] == 0, left[number - 1]
        assert_same_runs(folder, whole)
        assert {path.name for path in folder.glob(".*")} == {".lock", ".mine"}


def test_a_run_of_an_earlier_version_resumes_and_is_compared(run, command, tmp_path, stop_in_epoch):
    """One whose checkpoints had no scheduler, and whose records had other names."""
    line = ("--epochs", "4", "--crop-size", "24", "--whole-images-share", "0.5")
    assert run(*line, "--name", "whole")[0] == 0
    stop_in_epoch(3)
    assert run(*line)[0] == 130
    folder, whole = find_runs(tmp_path / "logs")
    state = unpack(folder / CHECKPOINT)
    settings = state["record"]["config"]
    settings["uncropped_share"] = settings.pop("whole_images_share")
    settings |= {"warmup": 0.0, "capture": True}
    for gone in (state["record"]["config"].pop("schedule"), state["record"].pop("sources"), state.pop("scheduler")):
        assert gone
    state["record"]["procedure"] = {"schedule": "cfd86dc10173ec42"}
    state["record"]["network"]["identity"] = "0123"
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / CHECKPOINT).write_bytes(pack(state))
    (folder / "config.json").write_text(json.dumps(state["record"]))
    assert read_run(folder).record["config"]["whole_images_share"] == 0.5
    assert run("--resume", "--whole-images-share", "0.5")[0] == 0
    assert figures(folder) == figures(whole)
    tensors = [load_file(each / FINAL) for each in (folder, whole)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert command("compare", "--log-dir", tmp_path / "logs", folder, "whole")[0] == 0


def test_a_new_column_is_logged_and_goes_on_when_resumed(run, tmp_path, stop_in_epoch, monkeypatch):
    """As main.py would add it to its row."""
    log_epoch = Run.log_epoch
    monkeypatch.setattr(Run, "log_epoch", lambda self, row: log_epoch(self, row | {"grad_norm": 1.25 + row["epoch"]}))
    stop_in_epoch(1)
    status, out, _ = run("--epochs", "2", "--tensorboard")
    assert status == 130
    header, row = out.splitlines()[-2:]
    assert header.split()[-2:] == ["grad_norm", "seconds"]
    assert row.split()[-2] == "1.25"
    status, out, _ = run("--resume")
    assert status == 0
    assert sum("grad_norm" in line for line in out.splitlines()) == 1
    assert [row["grad_norm"] for row in read_run(only_run(tmp_path)).rows] == [1.25, 2.25]


def test_edits_are_noted_and_the_run_goes_on(run, tmp_path, stop_in_epoch, edited):
    stop_in_epoch(1)
    assert run("--epochs", "2")[0] == 130
    edited("main.py", r"loss\.backward\(\)", "(2 * loss).backward()")
    assert run("--resume")[0] == 0
    found = read_run(only_run(tmp_path))
    (note,) = (line for line in found.comments if line.startswith("resumed at epoch 1 with changes, so the bits may differ"))
    assert note.endswith(": main.py edited")
    assert [piece["epoch"] for piece in found.record["sources"]["resumed"]] == [1]


def test_states_that_do_not_fit_are_one_line_and_the_run_waits(run, tmp_path, stop_in_epoch, monkeypatch):
    stop_in_epoch(1)
    assert run("--epochs", "2")[0] == 130
    before = (only_run(tmp_path) / CHECKPOINT).read_bytes()
    for name, replacement in (
            ("Net", lambda *_, **__: nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
            ("SGD", lambda parameters, **_: torch.optim.SGD([{"params": [each]} for each in parameters], lr=0.1)),
            ("make_scheduler", restarts)):
        with monkeypatch.context() as patch:
            patch.setattr(main, name, replacement)
            status, _, err = run("--resume")
        assert status == 2
        assert "does not fit the network, the optimizer or the scheduler of this program: undo the edits" in one_line(err)
    assert (only_run(tmp_path) / CHECKPOINT).read_bytes() == before
    assert run("--resume")[0] == 0


def test_only_what_changes_no_result_may_change(run, tmp_path, stop_in_epoch, pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    stop_in_epoch(1)
    assert run("--epochs", "2", "--data-dir", pictures.name)[0] == 130
    monkeypatch.chdir(tmp_path)  # the run finds its images from there too
    first, may_change, refused = loaded(tmp_path).config, set(), {}
    assert first.data_dir == str(pictures)
    for name, field in SETTINGS.items():
        value, low, choices = getattr(first, name), field.metadata["low"], field.metadata["choices"]
        other = (not value if field.type is bool else next(each for each in choices if each not in (value, "auto")) if choices
                 else "cuda" if name == "device" else f"{value}x" if field.type is str
                 else field.type(low if value != low else field.metadata["high"]))
        try:
            found = loaded(tmp_path, **({name: other} if name != "log_dir" else {})).config
        except UserError as error:
            refused[name] = str(error)
        else:
            assert name == "log_dir" or getattr(found, name) == other
            may_change.add(name)
    assert [words for name, words in refused.items() if f"leave {flag(name)} out" not in words] == []
    assert may_change == {"workers", "threads", "device", "instruction_set", "data_dir", "log_dir", "pictures", "tensorboard",
                          "teacher", "init"}
    loaded(tmp_path, dataset="auto", batches="auto")  # as the run may have been started
    status, _, err = run("--resume", "--data-dir", write_folder(tmp_path / "other", 10, 5))
    assert status == 2
    assert "are not those that run" in one_line(err)
    name = only_run(tmp_path).name
    status, out, err = run("--resume", name, "--epochs", "2", "--threads", "2")
    assert (status, one_line(err)[:14] if err else err) in ((0, ""), (0, "--threads is 2"))
    assert "resumed at epoch 1 with changes, so the bits may differ" in out
    assert any(line.endswith(": threads 1 -> 2") for line in read_run(only_run(tmp_path)).comments)
    status, _, err = run("--resume", name)
    assert status == 2
    assert "is finished: there is nothing to resume" in one_line(err)


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


def test_a_run_with_a_negative_loss_and_masks_resumes(run, tmp_path, stop_in_epoch, monkeypatch):
    class Masked(Net):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
            self.register_buffer("bytes", torch.ones(2, dtype=torch.uint8))

    monkeypatch.setattr(main, "Net", Masked)
    averages = main.averages
    monkeypatch.setattr(main, "averages", lambda sums, count: (averages(sums, count)[0] - 5, averages(sums, count)[1]))
    stop_in_epoch(1)
    assert run("--epochs", "2")[0] == 130
    assert run("--resume")[0] == 0
    assert read_run(only_run(tmp_path)).rows[-1]["train_loss"] < 0


def test_runs_at_once_never_mix(run, tmp_path, monkeypatch):
    """One that starts and ends while another trains; and a second resume of the one that trains."""
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, lambda: run_line(["--resume", "--log-dir", str(tmp_path / "logs")]))
        status, _, err = run("--epochs", "2", "--seed", "1")
    assert status == 0
    assert "is still running: wait for it, or stop it first" in one_line(err)
    train_epoch, calls = main.train_epoch, iter(range(10))

    def nested(*given):
        if next(calls) == 1:
            assert run("--epochs", "1", "--seed", "2", "--name", "inner")[0] == 0
        return train_epoch(*given)

    monkeypatch.setattr(main, "train_epoch", nested)
    assert run("--epochs", "2", "--seed", "1", "--name", "outer")[0] == 0
    inner, outer, alone = find_runs(tmp_path / "logs")
    assert [read_run(folder).record["number"] for folder in (inner, outer, alone)] == [3, 2, 1]
    assert figures(outer) == figures(alone)
    assert (tmp_path / "logs" / "model_accuracy.log").read_bytes() == (inner / "model_accuracy.log").read_bytes()


# ---------------------------------------------------------------- checkpoints

class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def begin(tmp_path: Path, run: Run | None = None, **settings) -> Run:
    """Begin a new run of a tiny network, or go on with `run`."""
    inputs, net = example_inputs(log_dir=str(tmp_path / "logs"), **settings), Tiny()
    optimizer = main.SGD(net.parameters(), lr=0.1, momentum=0.9)
    run = run or Run(inputs.config)
    run.begin(inputs, net, optimizer, main.make_scheduler(optimizer, inputs.config, 1))
    return run


def log_epoch(run: Run, number: int, accuracy: float) -> None:
    """Log an epoch whose validation accuracy and whose weights are these."""
    for parameter in run.net.parameters():
        nn.init.constant_(parameter, number)
    run.log_epoch(example_row(number) | {"val_loss": 1.0, "val_acc": accuracy})


def test_a_signal_between_any_two_lines_of_saving_an_epoch_loses_nothing(tmp_path, every_epoch, monkeypatch):
    """A checkpoint always has the best weights of its epochs, and the log its rows."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes the most time
    codes = {each.__code__ for each in (Run.log_epoch, Run._snapshot, Run._write_checkpoint, Run._write_best, write_checkpoint)}
    run, before, saved_epochs, notes = begin(tmp_path, validation=10, epochs=3), sys.gettrace(), set(), []
    beginning = run.state
    for line in itertools.count():
        countdown = iter(range(line, -1, -1))

        def trace(frame, event, _, countdown=countdown):
            if frame.f_code not in codes:
                return None
            if event == "line" and next(countdown, None) == 0:
                raise StopRequested(signal.SIGTERM)
            return trace

        run.state, run.saved_epochs = beginning, 0
        try:
            with run:
                log_epoch(run, 0, 10.0)
                sys.settrace(trace)
                log_epoch(run, 1, 20.0)  # better
        except StopRequested as error:
            sys.settrace(before)
            count = len((state := read_newest(run.folder)[0])["rows"])
            notes.append(error.__notes__[0])
            assert len(read_run(run.folder).rows) == count == state["best"]["epoch"] + 1
            assert all((value == count - 1).all() for net in (state["net"], state["best"]["net"]) for value in net.values())
            saved_epochs.add(count)
        else:
            break
        finally:
            sys.settrace(before)
    assert len(notes) == line > 20
    assert all(f"; resume with: python main.py --resume {run.folder}" in note for note in notes)
    assert saved_epochs == {1, 2}


def test_checkpoints_are_ten_seconds_apart_and_best_weights_belong_to_the_newest(tmp_path, monkeypatch):
    """An epoch may be the best, and lost in a kill before the next checkpoint."""
    now, in_file, best = 0.0, [], []
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: now, strftime=time.strftime))
    run = begin(tmp_path, validation=10, epochs=8)
    with run:
        for epoch, accuracy in enumerate([50, 50, 60, 10, 70, 60, 80, 75]):  # as good is not better
            now += 4
            log_epoch(run, epoch, accuracy)
            state = unpack(run.folder / CHECKPOINT)
            in_file.append(len(state["rows"]))
            best.append(state["best"]["epoch"] if "best" in state else None)
            if "best" in state:
                weights = load_file(run.folder / BEST)
                assert all((value == best[-1]).all() for value in weights.values())
    assert in_file == [0, 0, 3, 3, 3, 6, 6, 8]
    assert best == [None, None, 2, 2, 2, 4, 4, 6]
    assert len(unpack(run.folder / PREVIOUS_CHECKPOINT)["rows"]) == 6
    (run.folder / BEST).unlink()  # a kill between the checkpoint and the best weights
    begin(tmp_path, loaded(tmp_path), validation=10, epochs=8)
    assert (load_file(run.folder / BEST)["0.weight"] == 6).all()


def test_a_log_is_never_ahead_of_the_checkpoint(tmp_path, monkeypatch):
    run = begin(tmp_path, epochs=3)
    monkeypatch.setattr(run_module, "write_checkpoint", lambda *_: raising(UserError("full"))())
    with pytest.raises(KeyboardInterrupt) as stopped, run:  # noqa: PT012
        run.log_epoch(example_row(0))
        assert len(read_run(run.folder).rows) == 1
        raise KeyboardInterrupt
    assert "no epoch is finished yet; resume with" in stopped.value.__notes__[0]
    assert read_run(run.folder).rows == unpack(run.folder / CHECKPOINT)["rows"] == []


def test_what_must_reach_the_disk_does_so_before_it_counts(run, tmp_path, monkeypatch):
    durable, write = {}, checkpoint.write
    events, replace, synced = [], os.replace, checkpoint.sync_folder

    def recorded(path, data, durable_write=False, **named):
        durable[path.name] = bool(named.get("durable", durable_write))
        write(path, data, durable[path.name])

    for module in (checkpoint, run_module, weights_module):
        monkeypatch.setattr(module, "write", recorded)
    monkeypatch.setattr(os, "replace", lambda one, other: (events.append(Path(other).name), replace(one, other)))
    monkeypatch.setattr(checkpoint, "sync_folder", lambda folder: (events.append("on disk"), synced(folder)))
    old = tmp_path / "logs" / "runs" / ".new-1"
    old.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * DAY,) * 2)
    assert run("--epochs", "1")[0] == 0
    assert all(durable[name] for name in (f".tmp-{CHECKPOINT}", FINAL, SUMMARY))
    at = events.index("on disk")
    assert events[at - 2:at] == [PREVIOUS_CHECKPOINT, CHECKPOINT]
    assert not old.exists()  # left by a program that was killed
    state = torch.load(only_run(tmp_path) / CHECKPOINT, weights_only=True)  # by users, too
    assert set(state) == checkpoint.KEYS | {"scheduler"}


@pytest.mark.parametrize("formats", [(torch.channels_last, torch.contiguous_format),
                                     (torch.contiguous_format, torch.channels_last)])
def test_momentum_takes_the_memory_format_of_the_device_that_resumes(formats):
    """GPUs differ in it, and a fused optimizer refuses momentum that lies otherwise than the weights."""
    before, after = (Net().to(memory_format=format) for format in formats)
    optimizers = [main.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (before, after)]
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    before(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizers[0].step()
    optimizers[1].param_groups[0]["fused"] = True
    load_states({"net": before.state_dict(), "optimizer": optimizers[0].state_dict(), "scheduler": schedulers[0].state_dict(),
                 "rows": []}, after, optimizers[1], schedulers[1])
    assert optimizers[1].param_groups[0]["fused"]  # how it is computed is the device's
    for weight, other in zip(before.parameters(), after.parameters(), strict=True):
        momentum = optimizers[1].state[other]["momentum_buffer"]
        assert momentum.stride() == other.stride()
        assert torch.equal(momentum, optimizers[0].state[weight]["momentum_buffer"])


# ---------------------------------------------------------------- damage

@pytest.fixture
def saved(tmp_path) -> Run:
    """A run of a tiny network, two of whose three epochs are in its checkpoint, with momentum and best weights."""
    run = begin(tmp_path, validation=10, epochs=3)
    with pytest.raises(KeyboardInterrupt), run:  # noqa: PT012
        for epoch in range(2):
            run.net(torch.ones(1, 3, 8, 8)).sum().backward()
            run.optimizer.step()
            log_epoch(run, epoch, 50.0 + epoch)
        raise KeyboardInterrupt
    return run


def test_every_kind_of_damage_is_told(tmp_path, saved):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trap'}",)

    path, whole, buffer = saved.folder / CHECKPOINT, (saved.folder / CHECKPOINT).read_bytes(), io.BytesIO()
    torch.save({"net": Malicious()}, buffer)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    # with the right checksum: who can write the file can write that too
    evil = [content + hashlib.sha256(content).digest() for content in (pickle.dumps(Malicious()), buffer.getvalue())]
    for content in (b"", whole[:len(whole) // 2], bytes(flipped), bytes(len(whole)), pack({"weights": torch.zeros(3)}), *evil):
        for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
            (saved.folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"resumed: {CHECKPOINT} is damaged.* {PREVIOUS_CHECKPOINT} is damaged"):
            read_newest(saved.folder)
    assert path.read_bytes() == content
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("change", [
    lambda state: state["net"]["0.weight"][0, 0, 0].fill_(torch.nan),  # one of 27
    lambda state: state["best"]["net"]["0.bias"][-1:].fill_(torch.nan),
    lambda state: state["optimizer"]["state"][0]["momentum_buffer"].view(-1)[5:6].fill_(torch.nan),
    lambda state: state["best"]["net"].update({"0.bias": torch.zeros(2)}),
    lambda state: state["net"].update(x=torch.zeros(2).to(torch.float8_e4m3fn)),
    lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(())),
    lambda state: state["record"]["config"].update({1: "x"}),
    lambda state: state["record"]["config"].update(colour="blue"),  # of another version
    lambda state: state["rows"].pop(0)])
def test_values_under_a_right_checksum_that_are_no_state_are_refused(tmp_path, saved, change):
    state = unpack(saved.folder / CHECKPOINT)
    change(state)
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        (saved.folder / name).write_bytes(pack(state))
    with pytest.raises(UserError, match=r"can't be resumed|does not fit the network|another version of this program"):
        begin(tmp_path, loaded(tmp_path), validation=10, epochs=3)


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_used(run, tmp_path, every_epoch, stop_in_epoch):
    """The damaged one displaces no other."""
    assert run("--epochs", "3", "--log-dir", tmp_path / "whole")[0] == 0
    stop_in_epoch(2)
    assert run("--epochs", "3")[0] == 130
    folder = only_run(tmp_path)
    (folder / CHECKPOINT).write_bytes(b"damaged")
    stop_in_epoch(1)  # after one more
    status, out, _ = run("--resume")
    assert status == 130
    assert f"{CHECKPOINT} is damaged" in out
    assert f"went on from {PREVIOUS_CHECKPOINT}" in out
    assert (folder / "checkpoint.damaged.pt").read_bytes() == b"damaged"
    assert [len(unpack(folder / name)["rows"]) for name in (CHECKPOINT, PREVIOUS_CHECKPOINT)] == [2, 1]
    assert run("--resume")[0] == 0
    assert any(f"went on from {PREVIOUS_CHECKPOINT}" in line for line in read_run(folder).comments)
    assert_same_runs(folder, find_runs(tmp_path / "whole")[0])


def mutated(data: bytes, rng: random.Random) -> bytes:
    kind, at = rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if kind == 3:
        return data[:at] + rng.randbytes(min(16, len(data) - at)) + data[at + 16:]
    return data[:at] + data[at + rng.randrange(1, 100):]


def test_fuzz_of_checkpoint_config_and_log(saved):
    """300 random mutations: never anything but a UserError, never a state that is not the saved one."""
    folder, rng = saved.folder, random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in (CHECKPOINT, "config.json", "model_accuracy.log")}
    (folder / PREVIOUS_CHECKPOINT).unlink(missing_ok=True)
    for _ in range(50):
        content = mutated(whole[CHECKPOINT], rng)
        (folder / CHECKPOINT).write_bytes(content)
        if content != whole[CHECKPOINT]:
            with pytest.raises(UserError):
                read_newest(folder)
    for _ in range(150):  # with the right checksum, as who can write the file can write that
        content = mutated(whole[CHECKPOINT][:-checkpoint.DIGEST], rng)
        (folder / CHECKPOINT).write_bytes(content + hashlib.sha256(content).digest())
        with contextlib.suppress(UserError):
            read_newest(folder)
    for name in ("config.json", "model_accuracy.log"):
        for _ in range(50):
            (folder / name).write_bytes(mutated(whole[name], rng))
            with contextlib.suppress(UserError):
                read_run(folder)
        (folder / name).write_bytes(whole[name])


def subtrees(value, path=()):
    """The paths of everything inside nested dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from subtrees(value[key], (*path, key))


def test_wrong_values_under_a_right_checksum_are_never_a_traceback(tmp_path, saved):
    """60 checkpoints with a value of another type, shape or range: refused, or a run that goes on."""
    state, rng, refused = unpack(saved.folder / CHECKPOINT), random.Random(0), 0
    paths = [path for path in subtrees(state) if path[0] != "scheduler" and "param_groups" not in path]
    for _ in range(60):
        (*place, key), changed = rng.choice(paths), copy.deepcopy(state)
        inner = changed
        for part in place:
            inner = inner[part]
        inner[key] = rng.choice([None, "x", -1, 3.5, True, [], {}, torch.zeros(3), float("nan"), [[]], {"a": []}])
        for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
            (saved.folder / name).write_bytes(pack(changed))
        try:
            run = begin(tmp_path, loaded(tmp_path), validation=10, epochs=3)
            run.net(torch.ones(1, 3, 8, 8)).sum().backward()
            run.optimizer.step()
        except UserError:
            refused += 1
        for left in saved.folder.glob("checkpoint.damaged.pt"):
            left.unlink()
    assert refused > 20


# ---------------------------------------------------------------- signals

def wait_for(process: subprocess.Popen, word: str) -> None:
    """Read the process's output up to the line that begins with `word`."""
    while (line := process.stdout.readline()).split()[:1] != [word]:
        assert line, process.stderr.read()


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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds a program's workers in /proc")
def test_a_killed_worker_a_signal_and_kill_9(pictures, tmp_path):
    """Of one run with two workers, resumed each time."""
    line = ["--dataset", "folder", "--data-dir", str(pictures), "--log-dir", str(tmp_path / "logs"), "--epochs", "100000",
            *SMALL, "--batches", "workers", "--workers", "2"]
    process = start_program(*line)
    wait_for(process, "1")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    folder = only_run(tmp_path)
    assert process.returncode == 2, err
    assert "a worker process was killed" in one_line(err)
    assert "epochs 0 to" in err
    assert f"--resume {folder}\n" in err
    epochs = len(read_newest(folder)[0]["rows"])
    assert len(read_run(folder).rows) == epochs >= 2

    resume = ["--resume", "--log-dir", str(tmp_path / "logs")]
    process = start_program(*resume)
    wait_for(process, str(epochs))
    workers = [pid for pid in children(process.pid) if alive(pid)]
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal does: to the workers too
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM; epochs 0 to " in one_line(err)
    assert len(read_run(folder).rows) == len(read_newest(folder)[0]["rows"]) > epochs
    assert not any(alive(pid) for pid in workers)

    epochs = len(read_run(folder).rows)
    process = start_program(*resume, interval=0)
    wait_for(process, str(epochs + 1))
    with pytest.raises(UserError, match="is still running: wait for it, or stop it first"):
        loaded(tmp_path)
    process.kill()
    process.wait()
    assert len(loaded(tmp_path).rows) > epochs  # at once, while its workers may still be there
    process.communicate()


def test_a_second_signal_ends_it_at_once(run, monkeypatch):
    seen = []
    monkeypatch.setattr(Run, "_rescue", lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    at_epoch(monkeypatch, 0, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("--epochs", "1")[0] == 143
    assert seen == [signal.SIG_DFL]


def test_the_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested), stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("alone", 50), ("init and teacher", 40), ("sweep", 40)])
def test_kill_9_at_random_moments(kind, kills, tmp_path):
    """With everything that is saved. After each kill the same command goes on, or --resume; what ends equals a program that
    nobody kills."""
    line = ["--dataset", "folder", "--data-dir", str(write_folder(tmp_path / "pictures", 200)), *SMALL, "--validation", "90",
            "--dropout", "0.1", "--schedule", "one-cycle", "--tensorboard"]
    if kind == "init and teacher":
        assert start_program(*line, "--epochs", "1", "--log-dir", str(tmp_path / "logs")).wait() == 0
        line += ["--init", str(ROOT / "logs/reference/best/seed-0"), "--teacher", str(only_run(tmp_path))]
    line += ["--epochs", "6"]
    if kind == "sweep":
        line = ["sweep", "--lr", "0.01,0.02", "--seeds", "2", *line]
    assert start_program(*line, "--log-dir", str(tmp_path / "whole")).wait() == 0
    whole = find_runs(tmp_path / "whole")
    longest, rng, killed, resumed = 2 * read_run(whole[0]).rows[-1]["seconds"], random.Random(2), 0, 0
    for number in itertools.count():
        logs, status = tmp_path / str(number), None
        while status is None:
            unfinished = [folder for folder in find_runs(logs) if run_state(folder) is RunState.UNFINISHED]
            resumed += sum(len(read_newest(folder)[0]["rows"]) > 0 for folder in unfinished)
            resume = ["--resume"] if unfinished and kind != "sweep" else line
            process = start_program(*resume, "--log-dir", str(logs), interval=0)
            if rng.random() < 0.9:  # the others are killed while they start
                while process.stdout.readline().split()[:1] not in (["epoch"], []):
                    pass
            try:
                _, err = process.communicate(timeout=rng.uniform(0, longest) if killed < kills else None)
                status = process.returncode
                assert status == 0, err
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                finished = [folder for folder in find_runs(logs) if run_state(folder) is RunState.FINISHED]
                status = 0 if kind != "sweep" and finished else None
        for run, other in zip(find_runs(logs), whole, strict=True):
            assert_same_runs(run, other)
        if killed == kills:
            break
    assert resumed > kills // 3  # in the middle, not at the beginning


# ---------------------------------------------------------------- faults

def test_what_ends_a_run_from_outside_is_named(run, monkeypatch):
    at_epoch(monkeypatch, 2, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))
    status, _, err = run("--epochs", "3")
    assert status == 2
    assert "out of GPU memory: close other" in one_line(err)
    assert "epochs 0 to 1 are safe; resume with: python main.py --resume" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "-l", disk], capture_output=True)


def test_a_full_disk(run, small_disk, tmp_path, monkeypatch, every_epoch):
    filler = small_disk / "filler"

    def fill(free: int) -> None:
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - free))

    assert run("--epochs", "3", "--log-dir", tmp_path / "whole")[0] == 0
    fill(100_000)
    status, _, err = run("--epochs", "3", "--log-dir", small_disk)  # no room for a run at all
    assert status == 2
    assert "No space left on device" in one_line(err)
    assert not list((small_disk / "runs").iterdir())
    filler.unlink()
    with monkeypatch.context() as patch:
        at_epoch(patch, 2, lambda: fill(100_000))
        status, _, err = run("--epochs", "3", "--tensorboard", "--log-dir", small_disk)
    assert status == 2
    assert "could not be written (No space left on device): make room" in one_line(err)
    assert "epochs 0 to 1 are safe; resume with" in err
    (folder,) = find_runs(small_disk)
    assert {path.name for path in folder.iterdir() if "tfevents" not in path.name} == {
        ".lock", CHECKPOINT, PREVIOUS_CHECKPOINT, "config.json", "config.py", "augmentation.py", "model.py", "main.py",
        "model_accuracy.log", "torch_summary.log"}
    filler.unlink()
    assert run("--resume", "--log-dir", small_disk)[0] == 0
    assert figures(folder) == figures(find_runs(tmp_path / "whole")[0])


def test_a_limit_to_the_size_of_files_is_as_a_full_disk(run, tmp_path, monkeypatch, every_epoch):
    """Which needs no right to mount a small one."""
    resource = pytest.importorskip("resource")
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
