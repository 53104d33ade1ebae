"""The learning rate is CosineAnnealingLR's, and another schedule or optimizer is a change of a few lines."""

import copy
import math

import pytest
import torch
from torch import nn
from tqdm import tqdm

from config import Config
from training.epoch import train_epoch
from training.schedule import learning_rate, policy_name
from training.step import TrainStep

CPU = torch.device("cpu")
PUBLISHED = {0: 0.010000, 10: 0.009619, 20: 0.008536, 30: 0.006914, 40: 0.005001, 50: 0.003087, 60: 0.001465, 70: 0.000382,
             79: 0.000005}


def test_the_rates_are_the_published_ones():
    assert {epoch: round(learning_rate(Config(), epoch), 6) for epoch in PUBLISHED} == PUBLISHED


def test_the_rates_are_those_of_cosine_annealing_stepped_per_epoch():
    config = Config(epochs=7, lr=0.3, min_lr=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs, config.min_lr)
    for epoch in range(config.epochs):
        assert learning_rate(config, epoch) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        assert learning_rate(config, epoch + 0.99) == learning_rate(config, epoch)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("epochs", "share", "uncropped"), [
    (10, 0.2, [8, 9]), (10, 0.0, []), (3, 1.0, [0, 1, 2]), (3, 0.2, [2]), (2, 0.2, [])])
def test_the_last_epochs_are_not_cropped(epochs, share, uncropped):
    config = Config(epochs=epochs, uncropped_share=share)
    assert [epoch for epoch in range(epochs) if policy_name(config, epoch) == "uncropped"] == uncropped
    assert {policy_name(config, epoch) for epoch in range(epochs)} <= {"train", "uncropped"}


def warm_up_then_cosine(config: Config, epoch: float) -> float:
    """A schedule that changes with each step: what someone would write in place of `learning_rate`."""
    if epoch < 1:
        return config.lr * epoch
    return config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def train(config: Config, net: nn.Module, optimizer: torch.optim.Optimizer, epochs: range) -> list[float]:
    """The learning rates that the steps ran with. Written as main.run_epoch."""
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    step = TrainStep(net, optimizer, CPU, 0.0)
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        batches = [(torch.randn(4, 3, 2, 2, generator=generator), torch.arange(4)) for _ in range(5)]
        with tqdm(disable=True) as bar:
            train_epoch(step, batches, lambda images, epoch=epoch: warm_up_then_cosine(config, epoch + images / 20), bar)
    return rates


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_schedule_per_step_and_another_optimizer_are_a_few_lines_resume_included(kind):
    config, results = Config(epochs=3, lr=0.1), []
    torch.manual_seed(0)
    first = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    for parts in ([range(3)], [range(2), range(2, 3)]):
        net, rates, saved = copy.deepcopy(first), [], None
        for epochs in parts:  # a part is what runs between two starts of the program
            optimizer = kind(net.parameters(), lr=config.lr)
            if saved:
                net.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            rates += train(config, net, optimizer, epochs)
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        assert rates == [warm_up_then_cosine(config, epoch + step / 5) for epoch in range(3) for step in range(5)]
        results.append(net.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in results), strict=True))
    assert not torch.equal(first[1].weight, net[1].weight)
