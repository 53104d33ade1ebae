"""What main.py makes of a config before the first epoch, without its records: for benchmarks of the program itself."""

from dataclasses import dataclass, replace

import torch

from config import Config, available_cores, net_settings
from model import Net
from tinycnn.data.batches import Batches, make_batches, make_policies, resolve_batches
from tinycnn.data.dataset import Images
from tinycnn.data.loading import load_images
from tinycnn.training.capture import Step, make_step
from tinycnn.training.dilated import use_fast_dilated_convs
from tinycnn.training.machine import find_device, keep_freed_memory, memory_format, seed_torch
from tinycnn.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Program:
    """A step that trains, and the batches to train on."""

    config: Config
    images: Images
    device: torch.device
    batches: Batches
    step: Step


def make_program(config: Config) -> Program:
    """As in main.train."""
    device, images = find_device(config.device), load_images(config.dataset, config.data_dir)
    policies = make_policies(config, *images.statistics)
    config = replace(config, batches=resolve_batches(config.batches, policies, images, device))
    keep_freed_memory()
    torch.set_num_threads(config.threads or available_cores())
    seed_torch(config.seed, 0)
    net = Net(len(images.class_names), **net_settings(vars(config))).to(device).to(memory_format=memory_format(device))
    use_fast_dilated_convs(net, device)
    return Program(config, images, device, make_batches(config, images, policies, device),
                   make_step(net, make_optimizer(net, config, device), device, config))
