"""What changes with the epoch, as functions of the config: the learning rate, and the policy of the training images."""

import math

import torch

from config import Config, uncropped_epochs


def learning_rate(config: Config, epoch: float) -> float:
    """The learning rate at `epoch`, which may be fractional: 3.5 is halfway through epoch 3.

    A cosine from `lr` to `min_lr`, stepped per epoch (Loshchilov and Hutter 2017, arXiv:1608.03983): the closed form of
    torch's CosineAnnealingLR. As a function it has no state to save, so a resumed run only counts its epochs.
    """
    progress = math.floor(epoch) / config.epochs  # without the floor the rate changes with each step
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def policy_name(config: Config, epoch: int) -> str:
    """The name of the policy that augments an epoch's training images."""
    return "uncropped" if epoch >= config.epochs - uncropped_epochs(vars(config)) else "train"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
