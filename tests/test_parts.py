"""The schedule and the policy, as the settings want them."""

import pytest
import torch

from config import Config
from training.augment import train_policy
from training.parts import make_scheduler


def rates(**settings: float) -> list[float]:
    config = Config(**settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    scheduler, found = make_scheduler(optimizer, config), []
    for _ in range(config.epochs):
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_a_warm_up_rises_in_equal_steps_and_the_cosine_follows():
    found = rates(epochs=20, lr=0.4, warmup=0.15, min_lr=0.0)
    assert found[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert found[3:] == pytest.approx(rates(epochs=17, lr=0.4, min_lr=0.0))


def test_a_warm_up_of_less_than_half_an_epoch_is_none():
    assert rates(epochs=4, warmup=0.1) == rates(epochs=4)
    assert rates(epochs=1, warmup=0.5) == rates(epochs=1)


def test_a_crop_keeps_the_size():
    policy = train_policy(Config(crop_padding=4), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert [type(step).__name__ for step in policy][2:4] == ["PadIfNeeded", "RandomCrop"]
    assert policy(image=torch.zeros(32, 32, 3, dtype=torch.uint8).numpy())["image"].shape == (32, 32, 3)
