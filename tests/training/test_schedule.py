"""The learning rate is CosineAnnealingLR's, and the last epochs are not cropped."""

import pytest
import torch
from torch import nn

from config import Config
from tinycnn.training.schedule import learning_rate, policy_name

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
