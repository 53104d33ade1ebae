"""Distillation: the loss, and steps with it."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from main import train_step
from tinycnn.training.capture import CapturedStep
from tinycnn.training.distillation import Distillation


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def softened(logits: torch.Tensor, temperature: float) -> np.ndarray:
    powers = np.exp(logits.detach().numpy().astype(float) / temperature)
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize(("weight", "temperature"), [(0.9, 4.0), (0.3, 1.0)])
def test_the_loss_is_hintons(batch, weight, temperature):
    images, labels = batch
    net, logits = network(0), network(1)(images)
    loss = F.cross_entropy(logits, labels)
    found = Distillation([net], weight, temperature)(images, logits, labels)
    teacher, student = softened(net(images), temperature), softened(logits, temperature)
    divergence = (teacher * np.log(teacher / student)).sum(1).mean()
    assert found.item() == pytest.approx((1 - weight) * loss.item() + weight * temperature**2 * divergence, rel=1e-5)


def test_several_teachers_are_the_mean_of_their_softened_predictions(batch):
    images, labels = batch
    nets, logits = [network(seed) for seed in (0, 2, 3)], 5 * network(1)(images)
    for net in nets[1:]:
        net[-1].weight.data *= 50  # so that their predictions differ
    found = Distillation(nets, 1.0, 4.0)(images, logits, labels)
    mean = np.mean([softened(net(images), 4.0) for net in nets], axis=0)
    divergence = (mean * np.log(mean / softened(logits, 4.0))).sum(1).mean()
    assert found.item() == pytest.approx(16 * divergence, rel=1e-5)


def test_a_student_that_agrees_with_its_teacher_learns_nothing_from_it(batch):
    images, labels = batch
    net = network(0).eval()
    logits = net(images)
    found = Distillation([copy.deepcopy(net)], 1.0, 4.0)(images, logits, labels)
    assert found.item() == pytest.approx(0, abs=1e-5)
    found.backward()
    assert all(parameter.grad.abs().max() < 1e-5 for parameter in net.parameters())


def test_a_step_leaves_the_teacher_unchanged(batch):
    distillation = Distillation([network(0)], 0.9, 4.0)
    [teacher], net = distillation.teachers, network(1).train()
    before = copy.deepcopy(teacher.state_dict())
    train_step(net, torch.optim.SGD(net.parameters(), lr=0.5), distillation, *batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_captured_step_distills_too(batch, device):
    place, nets = torch.device(device), []
    for captured in (False, True):
        net = network(1).train().to(place)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, fused=device == "cuda")
        step = partial(train_step, net, optimizer, Distillation([network(0).to(place)], 0.9, 4.0))
        step = CapturedStep(step, net, optimizer) if captured else step
        for _ in range(3):
            step(*(each.to(place) for each in batch))
        nets.append(net)
    assert step.can_capture
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2 if device == "cuda" else 1e-6)  # bfloat16 there
