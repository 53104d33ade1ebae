"""Edits of initialization, augmentation, schedule and training step are noticed, other edits are not."""

import dataclasses
import importlib
import random
import sys
from dataclasses import fields

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import ROOT, edit
from torch import nn

import augmentation
from config import MACHINE_SETTINGS, Config
from model import Net
from tinycnn.data import batches as making
from tinycnn.experiments.differences import COMMITTED_PROCEDURE
from tinycnn.training import procedure
from tinycnn.training.distributed import Processes
from tinycnn.training.optimizer import SGD
from tinycnn.training.procedure import PROBE, describe_procedure
from tinycnn.training.step import TrainStep

# settings that have no effect on these parts: the images, the network, and which random numbers are drawn
ELSEWHERE = {"batch_size", "validation", "seed", "teacher", "width", "dropout"}


def changed() -> set[str]:
    """The parts that are no longer as published."""
    return {name for name, fingerprint in describe_procedure().items() if fingerprint != COMMITTED_PROCEDURE[name]}


def test_the_program_trains_as_the_committed_runs_were():
    """They are compared with new ones as if they had these fingerprints. Who changes the procedure on purpose changes this
    test, not the constant."""
    assert describe_procedure() == COMMITTED_PROCEDURE


def test_every_setting_of_training_counts(monkeypatch):
    """Else an edit of what it does would go unnoticed."""
    assert {field.name for field in fields(Config)} - set(MACHINE_SETTINGS) - ELSEWHERE == PROBE.keys()
    monkeypatch.setattr(procedure, "PROBES", [PROBE])
    before = describe_procedure()
    for name, value in PROBE.items():
        other = not value if name == "nesterov" else value // 2 if type(value) is int else value / 2
        monkeypatch.setattr(procedure, "PROBES", [PROBE | {name: other}])
        assert describe_procedure() != before, name


def test_no_default_of_a_setting_counts(monkeypatch):
    """Users edit defaults in config.py, and add settings; runs have them among their settings."""
    seen: list[dict] = []

    def given(**settings):
        seen.append(settings)
        return Config(**{name: value for name, value in settings.items() if name != "jitter"})

    jitter = dataclasses.field(default=0.5, metadata={"low": 0.0, "choices": ()})
    jitter.type = float
    monkeypatch.setitem(procedure.SETTINGS, "jitter", jitter)
    monkeypatch.setattr(procedure, "Config", given)
    assert not changed()
    assert all(settings.keys() == procedure.SETTINGS.keys() - set(MACHINE_SETTINGS) for settings in seen)
    assert all(settings["jitter"] == 0.0 for settings in seen)


# ---------------------------------------------------------------- edits of the augmentation

def jittered(config, mean, std):
    return A.Compose([A.ColorJitter(p=0.5), *augmentation.train_policy(config, mean, std).transforms])


def reordered(config, mean, std):
    first, second, *others = augmentation.train_policy(config, mean, std).transforms
    return A.Compose([second, first, *others])


def with_a_blank_border(config, mean, std):
    policy = augmentation.train_policy(config, mean, std)
    policy.transforms[1].border_mode = 0
    return policy


def jittered_where_nothing_is_cropped(config, mean, std):
    return (jittered if config.crop_size == 32 else augmentation.train_policy)(config, mean, std)


@pytest.mark.parametrize("policy", [jittered, reordered, with_a_blank_border, jittered_where_nothing_is_cropped])
def test_another_augmentation(monkeypatch, policy):
    monkeypatch.setattr(making, "train_policy", policy)
    assert changed() == {"augmentation"}


@pytest.mark.parametrize("inside", [lambda own: own, lambda own: A.OneOf([A.Sequential([own])])])
def test_a_users_own_transform_counts_by_its_source(monkeypatch, tmp_path, inside):
    """Its parameters don't say what it does."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for negative in ("255 - img", "255   - img  # a comment", "254 - img"):
        (tmp_path / "own_transform.py").write_text(
            f"import albumentations as A\nclass Own(A.ImageOnlyTransform):\n    def apply(self, img, **_): return {negative}\n")
        sys.modules.pop("own_transform", None)
        own = importlib.import_module("own_transform").Own
        procedure._source.cache_clear()
        monkeypatch.setattr(making, "train_policy", lambda *_, own=own: A.Compose([inside(own(p=1))]))
        found.append(describe_procedure()["augmentation"])
    assert found[0] == found[1] != found[2]


@pytest.mark.filterwarnings("ignore:Using lambda")
def test_a_policy_that_cannot_be_described_counts_by_the_file_as_it_was_imported(monkeypatch):
    monkeypatch.setattr(making, "train_policy", lambda *_: A.Compose([A.Lambda(image=lambda image, **_: image)]))
    before = describe_procedure()
    assert changed() == {"augmentation"}
    monkeypatch.setitem(procedure.SOURCES, "augmentation.py", "edited")
    assert describe_procedure()["augmentation"] != before["augmentation"]


# ---------------------------------------------------------------- edits of the initialization

class Edited(Net):
    """The network after `edit_of`, an edit at the end of its __init__."""

    edit_of = staticmethod(lambda net: None)

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        type(self).edit_of(self)


def test_each_edit_of_the_initialization_is_another(monkeypatch):
    monkeypatch.setattr(procedure, "Net", Edited)
    found = set()
    for edit_of in (lambda net: nn.init.kaiming_normal_(net.conv_block2[1][1].weight),
                    lambda net: nn.init.kaiming_normal_(net.conv_block2[1][1].weight, mode="fan_out"),
                    lambda net: nn.init.constant_(net.conv_block4[1][2].weight, 0.5),
                    lambda net: nn.init.zeros_(net.head[1].bias),
                    lambda net: net.head[1].bias.data.copy_(torch.linspace(-1, 1, 10)),
                    lambda net: net.head[1].bias.data.copy_(torch.linspace(-2, 2, 10)),
                    lambda net: net.register_parameter("scale", nn.Parameter(torch.ones(3))),
                    lambda net: net.register_parameter("scale", nn.Parameter(torch.zeros(3)))):
        monkeypatch.setattr(Edited, "edit_of", staticmethod(edit_of))
        assert changed() == {"initialization"}
        found.add(describe_procedure()["initialization"])
    assert len(found) == 8


def test_a_network_with_other_layers_has_the_same_initialization(monkeypatch):
    """PyTorch's own. The layers have a fingerprint of their own, the network's identity."""
    source, edited = (ROOT / "model.py").read_text(), {}
    for before, after in (("            separable(c128, c192", "            separable(c128, c128), separable(c128, c192"),
                          ("nn.Conv2d(c256, num_classes, kernel_size=1)", "nn.Flatten(), nn.Linear(c256, num_classes)")):
        assert before in source
        source = source.replace(before, after)
    exec(source, edited)
    monkeypatch.setattr(procedure, "Net", edited["Net"])
    assert changed() == set()


def test_a_network_that_cannot_be_built_here_counts_by_its_source(monkeypatch):
    monkeypatch.setattr(procedure, "Net", None)
    before = describe_procedure()
    assert changed() == {"initialization"}
    monkeypatch.setitem(procedure.SOURCES, "model.py", "edited")
    assert describe_procedure()["initialization"] != before["initialization"]


# ---------------------------------------------------------------- edits of the schedule and of the step

def test_another_schedule(monkeypatch):
    rate, policy = procedure.learning_rate, procedure.policy_name
    with monkeypatch.context() as patch:
        edit(patch, "learning_rate", lambda config, epoch: rate(config, epoch) * min(1, epoch + 0.1))  # a short warm-up
        assert changed() == {"schedule"}
    with monkeypatch.context() as patch:
        edit(patch, "learning_rate", lambda config, epoch: rate(config, epoch) * (0.1 if epoch >= 60 else 1))
        assert changed() == {"schedule"}
    with monkeypatch.context() as patch:
        edit(patch, "policy_name", lambda config, epoch: "train" if epoch < 1 else policy(config, epoch))
        assert not changed()
        edit(patch, "policy_name", lambda config, epoch: "train")
        assert changed() == {"schedule"}
    edit(monkeypatch, "set_learning_rate", lambda optimizer, rate: optimizer.param_groups[0].update(lr=2 * rate))
    assert changed() == {"training step"}


def without_decay_of_depthwise(net, config, device):
    depthwise = [layer.weight for layer in net.modules() if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1]
    others = [weight for weight in net.parameters() if not any(weight is each for each in depthwise)]
    return SGD([{"params": depthwise, "weight_decay": 0.0}, {"params": others}], lr=config.lr, momentum=config.momentum,
               nesterov=config.nesterov, weight_decay=config.weight_decay)


def without_decay_of_norms(net, config, device):
    norms = [weight for weight in net.parameters() if weight.ndim == 1]
    others = [weight for weight in net.parameters() if weight.ndim > 1]
    return SGD([{"params": norms, "weight_decay": 0.0}, {"params": others}], lr=config.lr, momentum=config.momentum,
               nesterov=config.nesterov, weight_decay=config.weight_decay)


@pytest.mark.parametrize("optimizer", [
    without_decay_of_norms, without_decay_of_depthwise,
    lambda net, config, device: torch.optim.AdamW(net.parameters(), lr=config.lr),
    lambda net, config, device: SGD(net.parameters(), lr=config.lr, momentum=config.momentum, dampening=0.1,
                                    weight_decay=config.weight_decay)])
def test_another_optimizer(monkeypatch, optimizer):
    edit(monkeypatch, "make_optimizer", optimizer)
    assert changed() == {"training step"}


def test_pytorchs_own_sgd_is_no_other_optimizer(monkeypatch):
    edit(monkeypatch, "make_optimizer", lambda net, config, device: torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay))
    assert not changed()


def test_another_loss_or_clipped_gradients(monkeypatch):
    own_loss, average = TrainStep.own_loss, Processes.average_gradients
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "own_loss", lambda self, logits, *others: own_loss(self, logits, *others)
                      + 1e-3 * logits.square().mean())
        assert changed() == {"training step"}

    def clipped(self, net, images):
        average(self, net, images)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)

    monkeypatch.setattr(Processes, "average_gradients", clipped)  # which a step calls before its optimizer
    assert changed() == {"training step"}


def test_a_step_that_draws_random_numbers_is_the_same_at_any_time(monkeypatch):
    call = TrainStep.__call__

    def noisy(self, images, labels):
        call(self, images + torch.randn_like(images) + np.random.rand() + random.random(), labels)

    monkeypatch.setattr(TrainStep, "__call__", noisy)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        found.append(describe_procedure()["training step"])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
        assert random.getstate() == before[2]
    assert found[0] == found[1] != COMMITTED_PROCEDURE["training step"]
    unseeded = np.random.default_rng()
    monkeypatch.setattr(TrainStep, "__call__", lambda self, images, labels: call(self, images + unseeded.random(), labels))
    assert describe_procedure()["training step"] == describe_procedure()["training step"]  # then by its source


def test_a_step_that_needs_more_than_the_probe_counts_by_its_source(monkeypatch):
    def wants_images_of_32_pixels(self, images, labels):
        assert images.shape[-1] == 32

    monkeypatch.setattr(TrainStep, "__call__", wants_images_of_32_pixels)
    before = describe_procedure()
    assert changed() == {"training step"}
    monkeypatch.setitem(procedure.SOURCES, "tinycnn/training/step.py", "edited")
    assert describe_procedure()["training step"] != before["training step"]
