"""The policy, as the settings want it."""

import torch

from config import Config
from training.augment import train_policy


def test_a_crop_keeps_the_size():
    policy = train_policy(Config(crop_padding=4), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert [type(step).__name__ for step in policy][2:4] == ["PadIfNeeded", "RandomCrop"]
    assert policy(image=torch.zeros(32, 32, 3, dtype=torch.uint8).numpy())["image"].shape == (32, 32, 3)
