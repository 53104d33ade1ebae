import torch
from conftest import at_epoch, raising
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import main
from model import Net
from training.average import WeightAverage
from training.checkpoint import NEWEST, unpack
from training.loop import TrainStep, train_epoch
from training.records import FINAL, read_run

CPU = torch.device("cpu")
SETTINGS = ("--epochs", "3", "--average", "0.9")


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))


def test_the_average_is_the_sum_of_its_definition():
    net = small_net()
    average, history = WeightAverage(net, 0.9), []
    for _ in range(30):
        history.append([torch.randn_like(parameter) for parameter in net.parameters()])
        for parameter, value in zip(net.parameters(), history[-1], strict=True):
            parameter.data.copy_(value)
        average.update()
        shares = torch.tensor([0.9 ** age for age in reversed(range(len(history)))])
        for parameter, *values in zip(average.net.parameters(), *history, strict=True):
            torch.testing.assert_close(parameter, torch.tensordot(shares / shares.sum(), torch.stack(values), 1),
                                       rtol=1e-4, atol=1e-5)


def test_its_statistics_are_those_of_its_own_weights():
    net = small_net()
    average = WeightAverage(net, 0.9)
    nn.init.normal_(net[0].weight)
    average.update()
    batches = [(torch.randn(8, 3, 8, 8) + 1, torch.zeros(8)) for _ in range(3)]
    average.take_statistics(iter(batches))
    maps = torch.cat([net[0](images) for images, _ in batches])
    torch.testing.assert_close(average.net[1].running_mean, maps.mean((0, 2, 3)))
    variances = torch.stack([net[0](images).var((0, 2, 3)) for images, _ in batches])
    torch.testing.assert_close(average.net[1].running_var, variances.mean(0))
    assert not average.net.training
    assert net[1].num_batches_tracked == 0


def test_a_step_of_training_updates_it_and_is_not_changed_by_it():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.tensor([0, 1] * 4)) for _ in range(5)]
    nets = small_net(), small_net()
    average, after = WeightAverage(nets[0], 0.5), []
    for net, wanted in zip(nets, (average, None), strict=True):
        step = TrainStep(net, torch.optim.SGD(net.parameters(), lr=0.1), CPU, 0.0, wanted)
        for batch in batches:
            with tqdm(disable=True) as bar:
                train_epoch(step, [batch], bar)
            after.append(net[0].weight.detach().clone())
    assert all(torch.equal(one, other) for one, other in zip(after[:5], after[5:], strict=True))
    shares = torch.tensor([0.5 ** age for age in reversed(range(5))])
    expected = torch.tensordot(shares / shares.sum(), torch.stack(after[:5]), 1)
    torch.testing.assert_close(average.net[0].weight, expected)
    assert not average.net.training


def test_a_run_tests_and_saves_the_average(run, tmp_path, pictures, capsys):
    assert run(*SETTINGS)[0] == 0
    averaged, = (tmp_path / "logs" / "runs").iterdir()
    state = unpack(averaged / NEWEST)
    saved = load_file(averaged / FINAL)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state["average"]["net"].items())
    assert not all(torch.equal(saved[name], tensor) for name, tensor in state["net"].items())
    Net(num_classes=3).load_state_dict(saved)
    capsys.readouterr()
    assert main.main(["test", str(averaged), "--data-dir", str(pictures)]) == 0
    last = read_run(averaged).rows[-1]
    assert f"accuracy {last['test_acc']:.2f} %, loss {last['test_loss']:.4f}" in capsys.readouterr().out


def test_a_resumed_run_has_the_average_of_one_never_interrupted(run, tmp_path, monkeypatch):
    assert run(*SETTINGS, "--log-dir", str(tmp_path / "whole"))[0] == 0
    with monkeypatch.context() as patched:
        at_epoch(patched, 2, raising(KeyboardInterrupt()))
        assert run(*SETTINGS)[0] == 130
    assert run("--resume")[0] == 0
    whole, resumed = (next((tmp_path / logs / "runs").iterdir()) for logs in ("whole", "logs"))
    assert (whole / FINAL).read_bytes() == (resumed / FINAL).read_bytes()
