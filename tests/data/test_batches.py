"""Policies and batches of a run, as its config says."""

from dataclasses import replace

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import one_line, only_run, synthetic

from config import Config, UserError
from tinycnn.data.batches import check_policies, make_batches, make_policies, resolve_batches
from tinycnn.data.dataset import Images, Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.worker_batches import WorkerBatches
from tinycnn.runs.record import read_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> Images:
    """100 training, 20 validation and 40 test images."""
    data = synthetic()
    cut = replace(data, train=Split(data.train.images[:120], data.train.labels[:120]),
                  test=Split(data.test.images[:40], data.test.labels[:40]))
    return cut.hold_out(20)


@pytest.mark.parametrize("batches", ["device", "workers"])
def test_validation_and_test_images_are_normalized_and_not_augmented(images, batches):
    mean, std = images.statistics
    assert min(mean) > 1.2 * max(std)  # so that one can't be taken for the other
    config = Config(batches=batches, workers=0)
    made = make_batches(config, images, make_policies(config, mean, std), CPU)
    for name, split in (("validation", images.validation), ("test", images.test)):
        pixels = torch.cat([part for part, _ in made.in_order(name)]).permute(0, 2, 3, 1).numpy()
        assert np.allclose(pixels, (split.images / 255 - np.array(mean)) / np.array(std), atol=1e-5)
    order = np.concatenate([labels for _, labels in made.in_order("test")])
    assert order.tolist() == images.test.labels.tolist()


@pytest.mark.parametrize("batches", ["device", "workers"])
def test_training_images_are_augmented(images, batches):
    mean, std = images.statistics
    config = Config(batches=batches, workers=0, coarse_dropout_p=0.0, affine_p=0.0)
    made = make_batches(config, images, make_policies(config, mean, std), CPU)
    pixels = torch.cat([part for part, _ in made.in_order("train")]).permute(0, 2, 3, 1).numpy()
    plain = (images.train.images / 255 - np.array(mean)) / np.array(std)
    as_it_was, flipped = (np.isclose(pixels, other, atol=1e-5).all((1, 2, 3)) for other in (plain, plain[:, :, ::-1]))
    assert (as_it_was | flipped).all()
    assert 0.3 < flipped.mean() < 0.7


@pytest.mark.parametrize("batches", ["device", "workers"])
def test_images_with_two_policies_lie_there_once(images, batches):
    config = Config(batches=batches, workers=0, crop_size=16, uncropped_share=0.5)
    made = make_batches(config, images, make_policies(config, *images.statistics), CPU)
    data = made if batches == "device" else made.loader.dataset
    assert data.images["uncropped"] is data.images["train"]
    assert data.labels["uncropped"] is data.labels["train"]
    for share in (0.0, 0.001):  # of 80 epochs, none
        assert "uncropped" not in make_policies(Config(crop_size=16, uncropped_share=share), *images.statistics)


def test_batches_are_made_where_the_config_says(images):
    policies = make_policies(Config(), *images.statistics)
    assert isinstance(make_batches(Config(batches="device"), images, policies, CPU), DeviceBatches)
    assert isinstance(make_batches(Config(batches="workers", workers=0), images, policies, CPU), WorkerBatches)


# ---------------------------------------------------------------- auto, device, workers

def test_auto_is_the_device_where_that_is_possible(images, capsys):
    policies = make_policies(Config(), *images.statistics)
    assert resolve_batches("auto", policies, images, CPU) == "device"
    assert resolve_batches("device", policies, images, CPU) == "device"
    assert resolve_batches("workers", policies, images, CPU) == "workers"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("split", "device", "words"), [
    ("train", "cpu", "GaussNoise"), ("test", "cpu", "GaussNoise"), (None, "mps", "64-bit arithmetic")])
def test_auto_falls_back_to_workers_and_device_is_an_error(images, capsys, split, device, words):
    policies = make_policies(Config(), *images.statistics)
    if split:
        policies[split] = A.Compose([A.GaussNoise(), *policies[split].transforms])
    assert resolve_batches("auto", policies, images, torch.device(device)) == "workers"
    assert f"by workers: {words} can't run on whole batches on device {device}" in one_line(capsys.readouterr().out)
    with pytest.raises(UserError, match=f"--batches device can't run {words} .*: use --batches workers"):
        resolve_batches("device", policies, images, torch.device(device))
    assert resolve_batches("workers", policies, images, torch.device(device)) == "workers"


# ---------------------------------------------------------------- a run of the program

def test_a_run_augments_its_training_images_only(run, pictures, monkeypatch):
    """The policies that a training run makes its batches with, after --validation has held images out."""
    seen = []

    def spy(config, images, policies, device, *share_of):
        seen.append((images, policies))
        return make_batches(config, images, policies, device, *share_of)

    monkeypatch.setattr("main.make_batches", spy)
    assert run("--epochs", "1", "--validation", "6")[0] == 0
    [(images, policies)] = seen
    mean, std = images.statistics
    assert len(images.train) == 42
    expected = make_policies(Config(), mean, std)
    assert {name: policy.to_dict() for name, policy in policies.items()} == {
        name: policy.to_dict() for name, policy in expected.items()}
    for name in ("validation", "test"):
        [normalization] = policies[name].transforms
        assert (tuple(normalization.mean), tuple(normalization.std)) == (mean, std)


@pytest.mark.parametrize(("transform", "found"), [
    (A.RandomSizedCrop((20, 30), (24, 24), p=0.5), "24 x 24 x 3 and 32 x 32 x 3"),
    (A.ToGray(num_output_channels=1), "32 x 32")])
def test_a_policy_whose_images_fit_no_batch_is_named_before_the_run_begins(run, tmp_path, monkeypatch, transform, found):
    monkeypatch.setattr("tinycnn.data.batches.train_policy", lambda *_: A.Compose([transform]))
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert f"the policy of train images in augmentation.py makes images of {found}" in one_line(err)
    assert not list((tmp_path / "logs").glob("runs/*"))


def test_a_check_of_a_policy_changes_no_image(images):
    class InPlace(A.ImageOnlyTransform):
        def apply(self, img, **_):
            img[:] = 0
            return img

    before = images.train.images.copy()
    check_policies({"train": A.Compose([InPlace(p=1)])}, images)
    assert (images.train.images == before).all()


@pytest.mark.parametrize("policy", [
    lambda mean, std: [A.Resize(64, 64), A.Normalize(mean, std)], lambda mean, std: [A.Normalize((0.5,) * 3, (0.5,) * 3)],
    lambda mean, std: [A.Normalize(normalization="image")], lambda mean, std: []])
def test_test_images_are_normalized_and_nothing_else(run, monkeypatch, policy):
    """Because predict and export do no more."""
    monkeypatch.setattr("tinycnn.data.batches.test_policy", lambda *given: A.Compose(policy(*given)))
    status, _, err = run("--epochs", "1")
    assert status == 2
    assert "the test policy in augmentation.py must be A.Normalize(mean, std) alone" in one_line(err)


def test_a_run_whose_policy_cannot_run_on_the_device(run, tmp_path, monkeypatch):
    noisy = A.Compose([A.GaussNoise(), A.Normalize((0.5,) * 3, (0.2,) * 3)])
    monkeypatch.setattr("tinycnn.data.batches.train_policy", lambda *_: noisy)
    status, _, err = run("--epochs", "1", "--batches", "device")
    assert status == 2
    assert "--batches device can't run GaussNoise" in one_line(err)
    assert not list((tmp_path / "logs").glob("runs/*"))
    status, out, _ = run("--epochs", "1", "--batches", "auto")
    assert status == 0
    assert sum("GaussNoise" in line for line in out.splitlines()) == 1
    assert read_run(only_run(tmp_path)).record["config"]["batches"] == "workers"
