"""The parts of a run, as they are before its first epoch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import albumentations as A
import torch
from torch import nn

from config import Config
from training.augment import test_policy, train_policy
from training.batches import Batches
from training.capture import make_step
from training.device_batches import DeviceBatches, settled
from training.dilated import quicken
from training.images import Images, load
from training.loop import Step, cores, find_device, keep_freed_memory, seed_torch
from training.teacher import Teacher, find_teacher
from training.weights import MakeNet

DEMONSTRATION_EPOCHS = 5
BANNER = """
********************************************************************************
*  DEMONSTRATION on built-in drawn shapes, because there is no CIFAR-10 here.  *
*  No figure of this run says anything about CIFAR-10.                         *
********************************************************************************
"""


@dataclass
class Parts:
    """What a run is made of. `mean` and `deviation` are each channel's, as fractions of 255."""

    config: Config
    images: Images
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    policies: dict[str, A.Compose]
    device: torch.device
    net: nn.Module
    optimizer: torch.optim.SGD
    scheduler: torch.optim.lr_scheduler.CosineAnnealingLR
    step: Step
    teacher: Teacher | None

    def state(self) -> dict[str, Any]:
        """What training changes. The scheduler alone counts the epochs. No state of a random generator is in it: every
        random number is a function of (seed, epoch, image)."""
        return {name: getattr(self, name).state_dict() for name in ("net", "optimizer", "scheduler")}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what training changes. Raises RuntimeError or ValueError where `state` is another network's."""
        for name in ("net", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        for group in self.optimizer.param_groups:  # what the device at hand is best at, not the one of before
            group["fused"] = self.device.type == "cuda"

    def batches(self) -> Batches | DeviceBatches:
        """The batches of all three splits, made on the device or by worker processes."""
        config, images = self.config, self.images
        splits = {"train": images.train, "validation": images.validation, "test": images.test}
        if config.batches == "device":
            return DeviceBatches(splits, self.policies, config.batch_size, config.seed, self.device)
        return Batches(splits, self.policies, config.batch_size, config.seed, config.workers,
                       pin_memory=self.device.type == "cuda")


def build(config: Config, make_net: MakeNet) -> Parts:
    """The parts of a run; `make_net` is model.Net. What config leaves to `auto` is settled in theirs. Raises UserError for
    images, a device or a teacher that can't be had."""
    device = find_device(config.device)
    images = load(config.dataset, config.data_dir)
    if demonstrates(config, images.kind):
        print(BANNER)
        config = demonstration(config)
    config = dataclasses.replace(config, dataset=images.kind, threads=config.threads or cores())
    images = images.hold_out(config.validation)
    mean, deviation = images.statistics()
    normalization = test_policy(mean, deviation)
    policies = {"train": train_policy(config, mean, deviation), "validation": normalization, "test": normalization}
    config = dataclasses.replace(config, batches=settled(config.batches, policies, images.train, device))
    teacher = find_teacher(config, images, device, make_net)
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    seed_torch(config.seed, 0)
    net = make_net(len(images.class_names), config.dropout, config.width).to(device).to(memory_format=torch.channels_last)
    quicken(net, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
                                weight_decay=config.weight_decay, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=config.min_lr)
    return Parts(config, images, mean, deviation, policies, device, net, optimizer, scheduler,
                 make_step(net, optimizer, device, config, teacher), teacher)


def demonstrates(config: Config, kind: str) -> bool:
    """Whether a run of this config, which got images of this kind, was meant for CIFAR-10, where there is none."""
    return config.dataset == "auto" and kind == "synthetic"


def demonstration(config: Config) -> Config:
    """A config for such a run: a few epochs show how the program works."""
    return dataclasses.replace(config, epochs=min(config.epochs, DEMONSTRATION_EPOCHS))
