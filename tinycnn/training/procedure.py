"""How a run trains, beside its settings: fingerprints of initialization, augmentation, schedule and training step.

Each is of what the present code does with a few fixed configs, so between two runs it differs only where the code was edited.
"""

import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch import nn

from config import MACHINE_SETTINGS, SETTINGS, Config, net_settings
from model import Net
from tinycnn.data.batches import make_policies
from tinycnn.network.identity import fingerprint, plain_source
from tinycnn.training.distillation import Distillation
from tinycnn.training.optimizer import make_optimizer
from tinycnn.training.schedule import learning_rate, policy_name, set_learning_rate
from tinycnn.training.step import TrainStep

FILES = {"initialization": ["model.py"], "augmentation": ["augmentation.py"], "schedule": ["tinycnn/training/schedule.py"],
         "training step": ["tinycnn/training/optimizer.py", "tinycnn/training/step.py", "tinycnn/training/distillation.py"]}
# Read now: a user may edit them while the runs of a sweep are made
SOURCES = {file: plain_source(Path(__file__).parents[2] / file) for files in FILES.values() for file in files}
# The settings that these parts read. They and all others are fixed, so that another default in config.py is no edit
PROBE: dict[str, Any] = {
    "flip_p": 0.5, "affine_p": 0.5, "shift": 0.1, "scale": 0.2, "rotate": 20.0,
    "crop_padding": 2, "crop_size": 24, "uncropped_share": 0.25, "coarse_dropout_p": 0.5, "coarse_dropout_size": 8,
    "epochs": 8, "lr": 0.1, "min_lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1.0, "label_smoothing": 0.1,
    "teacher_share": 0.5, "temperature": 2.0}
PROBES = [PROBE, PROBE | {"crop_padding": 0, "crop_size": 32, "epochs": 300, "nesterov": False, "label_smoothing": 0.0}]


def describe_procedure() -> dict[str, str]:
    """The fingerprint of each part, 16 hex digits, by its name: a key of FILES.

    Where the code can't be run with these configs, or does something else each time, it is of its files' source, without
    comments, docstrings and layout.
    """
    return {name: _fingerprint_of(part, FILES[name]) for name, part in PARTS.items()}


def _fingerprint_of(part: Callable[[Config], Any], files: list[str]) -> str:
    """Of what `part` returns for the configs, or else of the sources of `files`."""
    try:
        configs = [Config(**{name: probe.get(name, _fixed(field)) for name, field in SETTINGS.items()
                             if name not in MACHINE_SETTINGS}) for probe in PROBES]
        results = []
        for _ in range(2):
            with _fixed_random_numbers():
                results.append(fingerprint([part(config) for config in configs]))
        if results[0] == results[1]:
            return results[0]
    except Exception:  # a user's code meets a config, a network and a batch that it was not written for
        pass
    return fingerprint([SOURCES[file] for file in files])


def _fixed(field: dataclasses.Field) -> Any:
    """A value of a setting, whatever its default is."""
    low, choices = field.metadata["low"], field.metadata["choices"]
    return choices[0] if choices else field.type() if low is None else field.type(low)  # type: ignore[operator]


@contextmanager
def _fixed_random_numbers() -> Iterator[None]:
    """The same in each call; the generators are left as they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _initialization(config: Config) -> Any:
    """Mean and standard deviation of each of the network's tensors that begins otherwise than its layer's `reset_parameters`
    leaves it. A network without such tensors has PyTorch's own initialization, whatever its layers are, if they are built in
    the order in which it holds them."""
    torch.default_generator.manual_seed(0)
    net = Net(10, **net_settings(vars(config)))
    begun = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for tensor in net.state_dict().values():
        tensor.fill_(77)  # stays where no layer resets it
    torch.default_generator.manual_seed(0)
    for layer in net.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
    usual = net.state_dict()
    return {name: [round(each.item(), 4) for each in (tensor.double().mean(), tensor.double().std(correction=0))]
            for name, tensor in begun.items() if not torch.equal(tensor, usual[name])}


def _augmentation(config: Config) -> Any:
    """Each policy's transforms with their parameters, and the sources of those that are not Albumentations' own."""
    policies = make_policies(config, (0.5,) * 3, (0.25,) * 3)
    files = {inspect.getfile(type(each)) for policy in policies.values() for each in _transforms(policy)
             if not type(each).__module__.startswith("albumentations.")}
    return [{name: policy.to_dict()["transform"] for name, policy in policies.items()}, sorted(map(_source, files))]


def _transforms(transform: Any) -> Iterator[Any]:
    """All in a transform, itself included."""
    yield transform
    if isinstance(transform, A.BaseCompose):
        for each in transform.transforms:
            yield from _transforms(each)


@cache
def _source(file: str) -> str:
    return plain_source(Path(file))


def _schedule(config: Config) -> Any:
    """The learning rate and the policy, four times an epoch."""
    quarters = [quarter / 4 for quarter in range(4 * config.epochs)]
    return [[round(learning_rate(config, epoch), 9), policy_name(config, int(epoch))] for epoch in quarters]


def _training_step(config: Config) -> Any:
    """The weights of a small network after a few steps: what computes the same loss, gradients and changes is the same."""
    head = nn.Conv2d(6, 3, 1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False),
                        nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), head, nn.Flatten()).double()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).double()
    for weight in (*net.parameters(), *teacher.parameters()):
        weight.data = torch.linspace(1, 40, weight.numel(), dtype=torch.double).sin().view_as(weight)
    head.weight.data *= 20  # so that gradients are large enough to be clipped
    images = torch.linspace(0, 90, 5 * 3 * 6 * 6, dtype=torch.double).sin().view(5, 3, 6, 6)
    cpu = torch.device("cpu")
    step = TrainStep(net, make_optimizer(net, config, cpu), cpu, config.label_smoothing,
                     Distillation([teacher], config.teacher_share, config.temperature))
    for number in range(6):
        set_learning_rate(step.optimizer, 1e-3 * (number + 1))
        step(images, torch.arange(5) % 3)
    sums = [(weight.flatten() * torch.arange(1, weight.numel() + 1)).sum().item() for weight in net.parameters()]
    return [round(each, 3) + 0.0 for each in sums]  # processors differ in the sixth digit, and -0.0 is 0.0


PARTS: dict[str, Callable[[Config], Any]] = {
    "initialization": _initialization, "augmentation": _augmentation, "schedule": _schedule, "training step": _training_step}
