import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import Net
from training.faults import Diverged
from training.loop import Figures, Result, TrainStep, find_device, seed_torch, train_epoch
from training.loop import test as evaluate

CPU = torch.device("cpu")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, 10, (size,), generator=generator))
            for size in (8, 8, 3)]


def net_and_optimizer():
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    return net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def test_an_epoch_is_the_plain_loop(batches):
    net, optimizer = net_and_optimizer()
    plain, plain_optimizer = net_and_optimizer()
    loss_sum = right = 0.0
    for images, labels in batches:
        logits = plain.train()(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        loss_sum += loss.item() * len(labels)
        right += (logits.argmax(1) == labels).sum().item()
    with tqdm(disable=True) as bar:
        result = train_epoch(TrainStep(net, optimizer, CPU, 0.1), batches, bar)
    assert result.loss == pytest.approx(loss_sum / 19, rel=1e-5)
    assert result.accuracy == pytest.approx(100 * right / 19)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))


def test_testing_changes_nothing_and_counts_every_image(batches):
    net, _ = net_and_optimizer()
    before = copy.deepcopy(net.state_dict())
    result = evaluate(net, batches, CPU)
    logits = torch.cat([net.eval()(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_epoch(batches):
    net, optimizer = net_and_optimizer()
    batches[1][0][0] = math.inf
    with pytest.raises(Diverged, match="the loss became nan"), tqdm(disable=True) as bar:
        train_epoch(TrainStep(net, optimizer, CPU, 0.0), batches, bar)


def test_the_figures_so_far_are_shown_about_once_a_second(batches, monkeypatch):
    from training import loop

    clock = iter(np.arange(0, 100, 0.4))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    shown = []
    monkeypatch.setattr(Figures, "glance", lambda self: shown.append(self.images))
    with tqdm(disable=True) as bar:
        train_epoch(TrainStep(*net_and_optimizer(), CPU, 0.0), batches * 4, bar)
    assert 3 <= len(shown) <= 5


def test_figures():
    figures = Figures(CPU)
    figures.add(torch.tensor(2.0), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    figures.add(torch.tensor(1.0), torch.eye(4)[:1], torch.tensor([0]))
    figures.images = 5
    assert figures.result() == figures.glance() == Result(loss=9 / 5, accuracy=80.0)


def test_torchs_random_numbers_are_a_function_of_seed_and_epoch():
    drawn = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**32 - 1, 5)):
        for _ in range(2):
            seed_torch(seed, epoch)
            drawn.add(torch.rand(1).item())
    assert len(drawn) == 4


def test_auto_finds_a_device():
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    assert find_device("cpu") == CPU
