"""What changes with the epoch, as functions of the config: the learning rate, and the policy of the training images."""

import math
from functools import cache

import torch

from config import Config, uncropped_epochs
from tinycnn.training.optimizer import SGD


def learning_rate(config: Config, epoch: float) -> float:
    """The learning rate at `epoch`, which may be fractional: 3.5 is halfway through epoch 3.

    torch's CosineAnnealingLR from `lr` to `min_lr`, stepped per epoch (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    return _rates(config.epochs, config.lr, config.min_lr)[math.floor(epoch)]


@cache
def _rates(epochs: int, lr: float, min_lr: float) -> list[float]:
    optimizer = SGD([torch.zeros(1)], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, min_lr)
    rates = []
    for _ in range(epochs + 1):
        rates += scheduler.get_last_lr()
        optimizer.step()  # schedulers warn where they are stepped before it
        scheduler.step()
    return rates


def policy_name(config: Config, epoch: int) -> str:
    """The name of the policy that augments an epoch's training images."""
    return "uncropped" if epoch >= config.epochs - uncropped_epochs(vars(config)) else "train"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
