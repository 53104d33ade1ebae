"""main.py's loops: an epoch is the plain loop, an evaluation changes nothing, a wrong output is named."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR

import main
from config import UserError
from model import Net
from tinycnn.data.tensors import Epoch
from tinycnn.errors import Diverged
from tinycnn.training.distillation import CrossEntropy
from tinycnn.training.machine import check_network
from tinycnn.training.optimizer import SGD


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last),
             torch.randint(0, 10, (size,), generator=generator)) for size in (8, 8, 3)]


def net_and_optimizer(optimizer=SGD):
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    return net, optimizer(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(net, optimizer, batches, scheduler=None, smoothing=0.0):
    step = partial(main.train_step, net, optimizer, CrossEntropy(smoothing))
    return main.train_epoch(step, net, Epoch(iter(batches), 19), scheduler or ConstantLR(optimizer, factor=1))


def plain_loop(net, optimizer, batches, rates=(0.05, 0.05, 0.05), smoothing=0.0):
    """Returns the mean loss and the accuracy."""
    loss_sum = correct = 0.0
    for (images, labels), rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        logits = net.train()(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
    return loss_sum / 19, 100 * correct / 19


def same_state(net, other) -> bool:
    return all(torch.equal(*pair) for pair in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_an_epoch_is_the_plain_loop(batches):
    net, optimizer = net_and_optimizer()
    plain, plain_optimizer = net_and_optimizer(torch.optim.SGD)
    expected = plain_loop(plain, plain_optimizer, batches, smoothing=0.1)
    found = train(net.eval(), optimizer, batches, smoothing=0.1)  # as a test leaves it: training has to set the mode itself
    assert net.training
    assert found == pytest.approx(expected, rel=1e-5)
    assert same_state(net, plain)


def test_one_cycle_steps_by_batch_and_others_do_not(batches):
    net, optimizer = net_and_optimizer()
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=6, cycle_momentum=False)
    rates = [scheduler.get_last_lr()[0]]
    twin = OneCycleLR(SGD([torch.zeros(1)], lr=0.05), 0.1, total_steps=6, cycle_momentum=False)
    for _ in range(2):
        twin.optimizer.step()
        twin.step()
        rates += twin.get_last_lr()
    plain, plain_optimizer = net_and_optimizer(torch.optim.SGD)
    plain_loop(plain, plain_optimizer, batches, rates)
    train(net, optimizer, batches, scheduler)
    assert same_state(net, plain)
    assert len(set(rates)) == 3


def test_evaluating_changes_nothing_and_counts_every_image(batches):
    net, _ = net_and_optimizer()
    before = copy.deepcopy(net.train().state_dict())
    loss, accuracy = main.test_epoch(net, Epoch(iter(batches), 19))
    logits = torch.cat([net.eval()(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_epoch(batches):
    net, optimizer = net_and_optimizer()
    batches[1][0][0] = math.inf
    with pytest.raises(Diverged, match="the loss became nan"):
        train(net, optimizer, batches)
    with pytest.raises(Diverged, match="the loss became nan"):
        main.test_epoch(net, Epoch(iter(batches), 19))


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
        check_network(net, 10)
    else:
        with pytest.raises(UserError, match=f"returns {found} for 2 images of 32 x 32 pixels, but must return 2 x 10, "
                                            "a logit for each class"):
            check_network(net, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_network_that_takes_no_crops_is_named():
    class Flattening(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(256 * 4 * 4, 10))

    check_network(Net(), 10, crop_size=16)
    check_network(Flattening(), 10)
    with pytest.raises(UserError, match=r"32 x 32 pixels only \(.*\), but --crop-size is 24: use --crop-size 32"):
        check_network(Flattening(), 10, crop_size=24)
