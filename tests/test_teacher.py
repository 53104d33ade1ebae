"""Learning from a teacher: the loss, and whole runs."""

import copy

import numpy as np
import pytest
import torch
from conftest import at_epoch, one_line, raising
from test_program import figures, weights_of
from torch import nn
from torch.nn import functional as F

from training.capture import CapturedStep
from training.checkpoint import config_of
from training.differences import settings
from training.loop import TrainStep
from training.records import find_runs, read_run
from training.sweep import made
from training.teacher import Teacher
from training.weights import read

CPU = torch.device("cpu")


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


# ---------------------------------------------------------------- the loss

def softened(logits: torch.Tensor, temperature: float) -> np.ndarray:
    powers = np.exp(logits.detach().numpy().astype(float) / temperature)
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize(("share", "temperature"), [(0.9, 4.0), (0.3, 1.0)])
def test_the_loss_is_hintons(batch, share, temperature):
    images, labels = batch
    net, logits = network(0), network(1)(images)
    loss = F.cross_entropy(logits, labels)
    found = Teacher(net, share, temperature, "").join(loss, logits, images)
    taught, learned = softened(net(images), temperature), softened(logits, temperature)
    divergence = (taught * np.log(taught / learned)).sum(1).mean()
    assert found.item() == pytest.approx((1 - share) * loss.item() + share * temperature**2 * divergence, rel=1e-5)


def test_who_knows_what_the_teacher_knows_learns_nothing_from_it(batch):
    images, labels = batch
    net = network(0).eval()
    logits = net(images)
    found = Teacher(copy.deepcopy(net), 1.0, 4.0, "").join(F.cross_entropy(logits, labels), logits, images)
    assert found.item() == pytest.approx(0, abs=1e-5)
    found.backward()
    assert all(parameter.grad.abs().max() < 1e-5 for parameter in net.parameters())


def test_a_step_leaves_the_teacher_as_it_is(batch):
    teacher = Teacher(network(0), 0.9, 4.0, "")
    before, net = copy.deepcopy(teacher.net.state_dict()), network(1).train()
    TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.5), CPU, 0.0, teacher)(*batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.net.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.net.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_captured_step_learns_from_it_too(batch, device):
    place, nets = torch.device(device), []
    for wrap in (lambda step: step, CapturedStep):
        net = network(1).train().to(place)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, fused=device == "cuda")
        step = TrainStep(net, optimizer, place, 0.0, Teacher(network(0).to(place), 0.9, 4.0, ""))
        taught = wrap(step)
        for _ in range(3):
            taught(*(each.to(place) for each in batch))
        nets.append(net)
    assert taught.possible
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2 if device == "cuda" else 1e-6)  # bfloat16 there


# ---------------------------------------------------------------- runs

@pytest.fixture
def taught(run, tmp_path):
    """A function that trains with the teacher `wide`, a run of one epoch: taught("--epochs", "2") -> (status, stderr,
    folder)."""
    assert run("--epochs", "1", "--width", "2", "--name", "wide", "--seed", "5")[0] == 0
    [wide] = find_runs(tmp_path / "logs")

    def taught(*arguments: str, teacher: str = "wide"):
        status, _, err = run("--teacher", teacher, *arguments)
        return status, err, max(find_runs(tmp_path / "logs"), key=lambda folder: folder.stat().st_mtime_ns)

    taught.wide = wide
    return taught


def test_a_run_learns_from_its_teacher(run, tmp_path, taught):
    status, err, folder = taught("--epochs", "2", "--name", "taught")
    assert (status, err) == (0, "")
    assert folder.name.endswith("taught")
    record = read_run(folder).record
    assert record["network"]["parameters"] < read_run(taught.wide).record["network"]["parameters"] / 3
    assert record["config"]["teacher"] == read(taught.wide / "final.safetensors").name
    _, _, without = taught("--epochs", "2", "--name", "without", teacher="")
    assert weights_of(without) != weights_of(folder)
    assert read_run(without).record["config"]["teacher"] == ""


def test_what_a_teacher_is_called_by_is_no_part_of_the_run(tmp_path, taught):
    one, other = (taught("--epochs", "1", "--name", "taught", teacher=name)[2] for name in ("wide", str(taught.wide)))
    assert one != other
    assert weights_of(one) == weights_of(other)
    for path in other.glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes() or path.suffix == ".pt"


def test_runs_of_two_teachers_are_not_one_row_nor_one_for_a_sweep(run, tmp_path, taught):
    fingerprint = read_run(taught.wide).record["dataset"]["sha256"]
    _, _, first = taught("--epochs", "1", "--name", "taught")
    config = config_of(read_run(first).record, {"log_dir": str(tmp_path / "logs"), "teacher": "wide"}, first)
    assert made(config, fingerprint) == first
    assert run("--epochs", "1", "--width", "3", "--name", "wide", "--seed", "6")[0] == 0
    assert made(config, fingerprint) is None
    _, _, second = taught("--epochs", "1", "--name", "taught", "--seed", "1")
    assert settings(read_run(first).record["config"]) != settings(read_run(second).record["config"])


def test_a_teacher_without_a_share_changes_no_bit(run, taught):
    _, _, ignoring = taught("--epochs", "2", "--name", "ignoring", "--teacher-share", "0")
    _, _, without = taught("--epochs", "2", "--name", "without", teacher="")
    assert ignoring != without
    assert figures(ignoring) == figures(without)


def test_a_resumed_run_has_the_same_teacher(run, tmp_path, taught, monkeypatch):
    _, _, whole = taught("--epochs", "3", "--name", "whole")
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, raising(KeyboardInterrupt()))
        status, _, folder = taught("--epochs", "3", "--name", "whole")
    assert (status, folder != whole) == (130, True)
    status, _, err = run("--resume", "--teacher", str(whole))
    assert status == 2
    assert "is not the one that run" in one_line(err)
    assert run("--resume", "--teacher", str(taught.wide))[0] == 0  # the same, by another name
    assert figures(folder) == figures(whole)


@pytest.mark.parametrize(("arguments", "teacher", "said"), [
    ((), "nobody", "there is no run 'nobody'"),
    (("--validation", "6"), None, "was trained on other images than this run's, or held others out"),
    (("--teacher-share", "1.5"), None, "teacher_share is 1.5, but must lie in 0 to 1"),
    (("--temperature", "0"), None, "temperature is 0.0, but must lie in 0.1 to 100"),
    (("--width", "0"), None, "width is 0, but must lie in 1 to 16"),
])
def test_a_wrong_teacher_is_named(tmp_path, taught, arguments, teacher, said):
    status, err, folder = taught(*arguments, teacher=teacher or "wide")
    assert status == 2
    assert said in one_line(err)
    assert folder == taught.wide  # no other was made


def test_a_wide_network_is_used_like_any(run, taught, pictures, tmp_path, capsys):
    import main

    for verb in (("test", "--data-dir", str(pictures)), ("predict", str(pictures / "test"))):
        assert main.main([*verb, "--log-dir", str(tmp_path / "logs"), "--device", "cpu"]) == 0
    assert "24 test images" in capsys.readouterr().out
