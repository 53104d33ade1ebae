"""How a run trains, beside its settings: fingerprints of the augmentation, the schedule and the training step.

Each is of what the present code does with one fixed config, so between two runs it differs only where the code was edited.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analysis.identity import fingerprint, plain_source
from batches.making import make_policies
from config import SETTINGS, Config
from training.distillation import Distillation
from training.optimizer import make_optimizer
from training.schedule import learning_rate, policy_name
from training.step import TrainStep

PROGRAM = Path(__file__).parents[1]
# All settings that these parts read, fixed here so that another default in config.py is no edit
PROBE: dict[str, Any] = {
    "flip_p": 0.5, "affine_p": 0.5, "shift": 0.1, "scale": 0.2, "rotate": 20.0,
    "crop_padding": 2, "crop_size": 24, "uncropped_share": 0.25, "coarse_dropout_p": 0.5, "coarse_dropout_size": 8,
    "epochs": 8, "lr": 0.1, "min_lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "label_smoothing": 0.1,
    "teacher_share": 0.5, "temperature": 2.0}


def describe_procedure() -> dict[str, str]:
    """The fingerprint of each part, 16 hex digits, by its name: a key of FILES.

    Where a part can't be tried out alone, its fingerprint is of its files' source without comments, docstrings and layout.
    """
    return {name: _try_out(part, FILES[name]) for name, part in PARTS.items()}


def _try_out(part: Callable[[Config], Any], files: tuple[str, ...]) -> str:
    try:
        with torch.random.fork_rng(devices=[]):
            return fingerprint(part(Config(**{name: value for name, value in PROBE.items() if name in SETTINGS})))
    except Exception:  # a user's code meets a config, a network and a batch that it was not written for
        return fingerprint([plain_source(PROGRAM / file) for file in files])


def _augmentation(config: Config) -> Any:
    """Each policy's transforms with their parameters; where one is not Albumentations' own, also the source that has it."""
    policies = {name: policy.to_dict()["transform"] for name, policy in make_policies(config, (0.5,) * 3, (0.25,) * 3).items()}
    foreign = '"__class_fullname__": "batches.' in json.dumps(policies)
    return [policies, *(plain_source(PROGRAM / file) for file in FILES["augmentation"] if foreign)]


def _schedule(config: Config) -> Any:
    """The learning rate and the policy, four times an epoch."""
    quarters = [quarter / 4 for quarter in range(4 * config.epochs)]
    return [[round(learning_rate(config, epoch), 9), policy_name(config, int(epoch))] for epoch in quarters]


def _training_step(config: Config) -> Any:
    """The weights of a small network after three steps: a loss, gradients and an optimizer that do the same are the same."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    for weight in (*net.parameters(), *teacher.parameters()):
        weight.data = torch.linspace(-1, 1, weight.numel() + 2, dtype=torch.double)[1:-1].view_as(weight)
    images = torch.linspace(0, 20, 5 * 3 * 2 * 2, dtype=torch.double).sin().view(5, 3, 2, 2)
    cpu = torch.device("cpu")
    step = TrainStep(net, make_optimizer(net, config, cpu), cpu, config.label_smoothing,
                     Distillation([teacher], config.teacher_share, config.temperature))
    for _ in range(3):
        step(images, torch.arange(5) % 3)
    sums = [(weight.flatten() * torch.arange(1, weight.numel() + 1)).sum().item() for weight in net.parameters()]
    return [round(each, 4) + 0.0 for each in sums]  # processors differ in the seventh digit, and -0.0 is 0.0


PARTS: dict[str, Callable[[Config], Any]] = {
    "augmentation": _augmentation, "schedule": _schedule, "training step": _training_step}
FILES = {"augmentation": ("batches/augmentation.py",), "schedule": ("training/schedule.py",),
         "training step": ("training/optimizer.py", "training/step.py", "training/distillation.py")}
