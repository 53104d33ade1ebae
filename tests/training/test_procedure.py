"""Edits of the augmentation, the schedule and the training step are noticed, other edits are not."""

from dataclasses import fields, replace

import albumentations as A
import pytest
import torch
from conftest import edit

from batches import augmentation, making
from config import MACHINE_SETTINGS, Config
from experiments.differences import COMMITTED_PROCEDURE
from training import procedure
from training.optimizer import SGD
from training.procedure import PROBE, describe_procedure
from training.step import TrainStep

# settings that these three parts don't read: the images, the network, and which random numbers are drawn
ELSEWHERE = {"batch_size", "validation", "seed", "teacher", "width", "dropout"}


def changed() -> set[str]:
    """The parts that are no longer as published."""
    return {name for name, fingerprint in describe_procedure().items() if fingerprint != COMMITTED_PROCEDURE[name]}


def test_the_program_trains_as_published():
    """The committed runs are compared with new ones as if they had these fingerprints."""
    assert describe_procedure() == COMMITTED_PROCEDURE


def test_the_probe_sets_every_setting_of_training_and_each_counts(monkeypatch):
    assert {field.name for field in fields(Config)} - set(MACHINE_SETTINGS) - ELSEWHERE == PROBE.keys()
    for name, value in PROBE.items():
        with monkeypatch.context() as patch:
            patch.setitem(PROBE, name, not value if name == "nesterov" else value // 2 if type(value) is int else value / 2)
            assert changed(), name


def test_another_default_is_no_edit(monkeypatch):
    """Users edit defaults in config.py; runs have them among their settings."""
    monkeypatch.setattr(procedure, "Config", lambda **settings: replace(Config(**settings), batch_size=64, seed=5, width=2))
    assert not changed()


def test_a_setting_that_users_have_removed_is_not_set(monkeypatch):
    seen: list[dict] = []
    monkeypatch.delitem(procedure.SETTINGS, "rotate")
    monkeypatch.setattr(procedure, "Config", lambda **settings: seen.append(settings) or Config(**settings, rotate=20.0))
    assert not changed()
    assert "rotate" not in seen[0]


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


@pytest.mark.parametrize("policy", [jittered, reordered, with_a_blank_border])
def test_another_augmentation(monkeypatch, policy):
    monkeypatch.setattr(making, "train_policy", policy)
    assert changed() == {"augmentation"}


def test_another_normalization_of_the_test_images(monkeypatch):
    monkeypatch.setattr(making, "test_policy", lambda mean, std: A.Compose([A.Normalize(mean, std), A.CenterCrop(28, 28)]))
    assert changed() == {"augmentation"}


class Own(A.ImageOnlyTransform):
    """A user's transform; its source counts, because its parameters don't say what it does."""

    __module__ = "batches.augmentation"

    def apply(self, img, **_):
        return 255 - img


@pytest.mark.filterwarnings("ignore:Using lambda")
@pytest.mark.parametrize("transform", [lambda: Own(p=1), lambda: A.Lambda(image=lambda image, **_: image)])
def test_a_users_own_transform_counts_by_its_source(monkeypatch, tmp_path, transform):
    """Also where Albumentations can't describe it."""
    monkeypatch.setattr(making, "train_policy", lambda *_: A.Compose([transform()]))
    monkeypatch.setattr(procedure, "PROGRAM", tmp_path)
    source = tmp_path / "batches" / "augmentation.py"
    source.parent.mkdir()
    found = []
    for text in ('"""Text."""\nx = 1\n', '"""Another text."""\nx   = 1  # a comment\n', '"""Text."""\nx = 2\n'):
        source.write_text(text)
        found.append(describe_procedure()["augmentation"])
    assert found[0] == found[1] != found[2]


# ---------------------------------------------------------------- edits of the schedule and of the step

def test_another_schedule(monkeypatch):
    rate, policy = procedure.learning_rate, procedure.policy_name
    with monkeypatch.context() as patch:
        edit(patch, "learning_rate", lambda config, epoch: rate(config, epoch) * min(1, epoch + 0.1))  # a short warm-up
        assert changed() == {"schedule"}
    edit(monkeypatch, "policy_name", lambda config, epoch: "train" if epoch < 1 else policy(config, epoch))
    assert not changed()
    edit(monkeypatch, "policy_name", lambda config, epoch: "train")
    assert changed() == {"schedule"}


def without_decay_of_norms(net, config, device):
    norms = [weight for weight in net.parameters() if weight.ndim == 1]
    others = [weight for weight in net.parameters() if weight.ndim > 1]
    return SGD([{"params": norms, "weight_decay": 0.0}, {"params": others}], lr=config.lr, momentum=config.momentum,
               nesterov=config.nesterov, weight_decay=config.weight_decay)


@pytest.mark.parametrize("optimizer", [
    without_decay_of_norms,
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
    own_loss, call = TrainStep.own_loss, TrainStep.__call__
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "own_loss", lambda self, logits, *others: own_loss(self, logits, *others)
                      + 1e-3 * logits.square().mean())
        assert changed() == {"training step"}

    def clipped(self, images, labels):
        for weight in self.net.parameters():
            if not weight._backward_hooks:
                weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        call(self, images, labels)

    monkeypatch.setattr(TrainStep, "__call__", clipped)
    assert changed() == {"training step"}


def test_a_step_that_needs_more_than_the_probe_counts_by_its_source(monkeypatch):
    def wants_images_of_32_pixels(self, images, labels):
        assert images.shape[-1] == 32

    monkeypatch.setattr(TrainStep, "__call__", wants_images_of_32_pixels)
    before = describe_procedure()
    assert changed() == {"training step"}
    monkeypatch.setattr(procedure, "plain_source", lambda path: path.name)
    assert describe_procedure()["training step"] != before["training step"]


def test_the_random_generator_is_left_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    describe_procedure()
    assert torch.equal(torch.rand(1), expected)
