"""An epoch is the plain loop; an evaluation changes nothing; a wrong output is named."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError
from model import Net
from tinycnn.training import epoch
from tinycnn.training.epoch import check_output, evaluate, predict, train_epoch
from tinycnn.training.errors import Diverged
from tinycnn.training.metrics import Metrics, Result
from tinycnn.training.step import TrainStep, counting_batches_together

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


def run_epoch(step: TrainStep, batches, learning_rate=lambda images: 0.05) -> Result:
    with tqdm(disable=True) as bar:
        return train_epoch(step, batches, learning_rate, bar)


def test_a_step_frees_its_network_at_once():
    """So that a sweep's next run finds the GPU's memory free."""
    net, optimizer = net_and_optimizer()
    step, freed = TrainStep(net, optimizer, CPU, 0.0), []
    weakref.finalize(net, freed.append, True)
    gc.disable()
    try:
        del net, optimizer, step
        assert freed
    finally:
        gc.enable()


def test_an_epoch_is_the_plain_loop(batches):
    net, optimizer = net_and_optimizer()
    plain, plain_optimizer = net_and_optimizer()
    loss_sum = correct = 0.0
    for images, labels in batches:
        logits = plain.train()(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
    step = TrainStep(net.eval(), optimizer, CPU, 0.1)  # as an evaluation leaves it: training has to set the mode itself
    result = run_epoch(step, batches)
    assert net.training
    assert result.loss == pytest.approx(loss_sum / 19, rel=1e-5)
    assert result.accuracy == pytest.approx(100 * correct / 19)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))
    assert step.first_done


def test_each_step_has_its_own_learning_rate(batches):
    net, optimizer = net_and_optimizer()
    plain, plain_optimizer = net_and_optimizer()
    asked = []

    def rate(images: int) -> float:
        asked.append(images)
        return 0.1 / (1 + images)

    for (images, labels), seen in zip(batches, (0, 8, 16), strict=True):
        plain_optimizer.param_groups[0]["lr"] = 0.1 / (1 + seen)
        plain_optimizer.zero_grad()
        F.cross_entropy(plain.train()(images.to(memory_format=torch.channels_last)), labels).backward()
        plain_optimizer.step()
    run_epoch(TrainStep(net, optimizer, CPU, 0.0), batches, rate)
    assert asked == [0, 8, 16]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))


def test_evaluating_changes_nothing_and_counts_every_image(batches):
    net, _ = net_and_optimizer()
    before = copy.deepcopy(net.train().state_dict())
    result = evaluate(net, batches, CPU)
    logits = torch.cat([net.eval()(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not predict(net, batches, CPU)[0].requires_grad


def test_a_loss_that_is_not_finite_stops_the_epoch(batches):
    net, optimizer = net_and_optimizer()
    batches[1][0][0] = math.inf
    with pytest.raises(Diverged, match="the loss became nan"):
        run_epoch(TrainStep(net, optimizer, CPU, 0.0), batches)
    with pytest.raises(Diverged, match="the loss became nan"):
        evaluate(net, batches, CPU)


def test_the_latest_metrics_are_shown_about_once_a_second(batches, monkeypatch):
    clock = iter(np.arange(0, 100, 0.4))
    monkeypatch.setattr(epoch.time, "monotonic", lambda: next(clock))
    shown = []
    monkeypatch.setattr(Metrics, "latest", lambda self: shown.append(self.images))
    run_epoch(TrainStep(*net_and_optimizer(), CPU, 0.0), batches * 4)
    assert 3 <= len(shown) <= 5


def test_counting_batches_together_gives_the_same_counts_and_statistics():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, track_running_stats=False),
                          nn.BatchNorm2d(3)).train()
    plain[3].eval()
    together = copy.deepcopy(plain)
    for _ in range(3):
        images = torch.randn(4, 3, 2, 2)
        expected = plain(images)
        with counting_batches_together(together, torch.device("cuda")):
            assert torch.equal(together(images), expected)
    assert together.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(*pair) for pair in zip(plain.state_dict().values(), together.state_dict().values(), strict=True))
    assert together[0].num_batches_tracked == 3


def test_metrics():
    metrics = Metrics(CPU)
    metrics.add(torch.tensor(2.0), torch.eye(4), torch.tensor([0, 1, 2, 0]))
    metrics.add(torch.tensor(1.0), torch.eye(4)[:1], torch.tensor([0]))
    metrics.images = 5
    assert metrics.result() == metrics.latest() == Result(loss=9 / 5, accuracy=80.0)
    metrics.reset()
    metrics.add(torch.tensor(1.0), torch.eye(4)[:1], torch.tensor([1]))
    metrics.images = 1
    assert metrics.result() == Result(loss=1.0, accuracy=0.0)


@pytest.mark.parametrize(("head", "found"), [
    (nn.Identity(), "2 x 10"), (nn.Unflatten(1, (10, 1, 1)), "2 x 10 x 1 x 1"), (nn.Linear(10, 3), "2 x 3"),
    (nn.Flatten(0), "20"), (lambda logits: (logits, logits), "tuple")])
def test_a_network_whose_output_is_not_logits_is_named(head, found):
    class WithHead(Net):
        def forward(self, images):
            return head(super().forward(images))

    net = WithHead()
    before = copy.deepcopy(net.state_dict())
    if found == "2 x 10":
        check_output(net, 10)
    else:
        with pytest.raises(UserError, match=f"returns {found} for 2 images of 32 x 32 pixels, but must return 2 x 10, "
                                            "a logit for each class"):
            check_output(net, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_network_that_takes_no_crops_is_named():
    class Flattening(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(256 * 4 * 4, 10))

    check_output(Net(), 10, crop_size=16)
    check_output(Flattening(), 10)
    with pytest.raises(UserError, match=r"32 x 32 pixels only \(.*\), but --crop-size is 24: use --crop-size 32"):
        check_output(Flattening(), 10, crop_size=24)
