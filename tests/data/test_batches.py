"""Batches, made in both ways: functions of (seed, epoch, image), by the policies of augmentation.py."""

import hashlib
import platform

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from conftest import one_line, only_run
from torch import Tensor

import augmentation
from config import Config, UserError
from tinycnn.data.batches import Batches, choose_batches, make_batches, make_policies
from tinycnn.data.dataset import Dataset, Split
from tinycnn.data.device_batches import DeviceBatches
from tinycnn.data.randomness import AUGMENTATION, random_stream
from tinycnn.data.worker_batches import WorkerBatches
from tinycnn.processes import world
from tinycnn.runs.record import read_run

CPU = torch.device("cpu")
AS_THEY_ARE = (0.0,) * 3, (1 / 255,) * 3  # statistics that normalization with leaves pixels as they are
both_ways = pytest.mark.parametrize("way", ["device", "workers"])


def noise(count: int, seed: int = 0) -> Split:
    """Images on which no wrong pixel can hide, with their numbers as labels."""
    return Split(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count))


NOISE = Dataset("folder", ("any",), noise(40), noise(10, 1), noise(10, 2))


def make(way: str, policy=augmentation.train_policy, dataset: Dataset = NOISE, statistics=AS_THEY_ARE, **settings) -> Batches:
    config = Config(**{"batches": way, "workers": 0, "batch_size": 16, "seed": 3} | settings)
    return make_batches(config, dataset, policy, augmentation.test_policy, CPU, statistics)


def joined(batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def by_image(batches) -> Tensor:
    """The images in the order of their numbers."""
    images, numbers = joined(batches)
    return images[numbers.argsort()]


def plain(*_, **__) -> A.Compose:
    return A.Compose([])


# ---------------------------------------------------------------- as ever

@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="OpenCV interpolates otherwise elsewhere")
@pytest.mark.parametrize(("way", "crops", "hashes"), [
    ("device", False, ["63d7d498782f2fc3", "ad3a4a41373b2736"]), ("device", True, ["59007e31b18cbb9d", "d3dafab092aec87c"]),
    ("workers", False, ["3379314b14dc416d", "43f131307fcec39a"]), ("workers", True, ["1fefd751a7f94e0d", "9424e1afd119fd2f"])])
def test_batches_are_those_of_earlier_versions(way, crops, hashes):
    """Those of the first epoch, and of the last, which has whole images where others have crops."""
    small = {"crop_padding": 4, "crop_size": 24, "whole_images_share": 0.2, "coarse_dropout_size": 8, "epochs": 10}
    images = Dataset("folder", ("any",), Split(noise(60).images[:40], np.arange(40) % 3), noise(10), noise(10))
    batches = make(way, dataset=images, **(small if crops else {}))
    for epoch, expected in zip((0, 9), hashes, strict=True):
        digest = hashlib.sha256()
        for pixels, labels in batches.train(epoch):
            digest.update(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        assert digest.hexdigest()[:16] == expected, epoch


# ---------------------------------------------------------------- functions of (seed, epoch, image)

@both_ways
def test_an_epoch_has_every_image_once_with_its_label(way):
    batches = make(way, plain)
    epoch = batches.train(0)
    assert epoch.images == 40
    made = list(epoch)
    assert [len(labels) for _, labels in made] == [16, 16, 8]
    assert batches.per_epoch == 3
    for images, labels in made:
        assert (images.dtype, images.shape[1:], labels.dtype) == (torch.float32, (3, 32, 32), torch.int64)
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(by_image(made).permute(0, 2, 3, 1), NOISE.train.images)


@both_ways
def test_order_and_augmentation_depend_on_seed_epoch_and_image_alone(way):
    """Not on the batch size, what ran before, or the other images."""
    images, order = joined(make(way).train(3))
    other = make(way, batch_size=7)
    joined(other.train(0))
    joined(other.test())
    again, same_order = joined(other.train(3))
    assert torch.equal(images, again)
    assert torch.equal(order, same_order)
    more = Dataset("folder", ("any",), noise(50), noise(1), noise(1))
    assert torch.equal(by_image(make(way, dataset=more).train(3))[:40], images[order.argsort()])
    for seed, epoch in ((4, 3), (3, 4)):
        changed, other_order = joined(make(way, seed=seed).train(epoch))
        assert not torch.equal(order, other_order)
        differ = (changed[other_order.argsort()] != images[order.argsort()]).flatten(1).any(1)
        assert differ.float().mean() > 0.7  # one in eight is not augmented at all


@both_ways
@pytest.mark.parametrize("changes", [{"flip_p": 0.5}, {"affine_p": 1.0}, {"coarse_dropout_p": 1.0, "coarse_dropout_size": 4},
                                     {"crop_padding": 4}])
def test_every_transform_draws_from_seed_epoch_and_image(way, changes):
    one = Split(noise(1).images.repeat(40, 0), np.arange(40))
    settings = {"flip_p": 0.0, "affine_p": 0.0, "coarse_dropout_p": 0.0} | changes

    def made(seed: int, epoch: int) -> Tensor:
        return by_image(make(way, dataset=Dataset("folder", ("any",), one, one, one), seed=seed, **settings).train(epoch))

    first = made(3, 1)
    assert len({image.numpy().tobytes() for image in first}) >= (2 if "flip_p" in changes else 20)
    assert torch.equal(first, made(3, 1))
    for seed, epoch in ((4, 1), (3, 2)):
        assert (first != made(seed, epoch)).flatten(1).any(1).float().mean() > 0.25


def test_random_streams_differ_in_every_argument():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**32 - 1, AUGMENTATION, 99_999, 10**7)]
    assert len({random_stream(*key).integers(2**63) for key in keys}) == 6


@both_ways
@pytest.mark.parametrize("batch_size", [16, 2])
def test_processes_share_each_batch(way, batch_size, monkeypatch):
    """A part may be empty. In the order of the processes, the parts are the batch."""
    batches = make(way, batch_size=batch_size)
    whole, parts = list(batches.train(1)), []
    monkeypatch.setattr(world, "size", 3)
    for rank in range(3):
        monkeypatch.setattr(world, "rank", rank)
        parts.append(list(batches.train(1)))
    for expected, *made in zip(whole, *parts, strict=True):
        assert all(torch.equal(one, torch.cat(each)) for one, each in zip(expected, zip(*made, strict=True), strict=True))
        assert max(len(labels) for _, labels in made) <= -(-batch_size // 3)
        assert all(images.dtype == torch.float32 for images, _ in made)


# ---------------------------------------------------------------- the policies

@both_ways
def test_validation_and_test_images_are_normalized_and_in_their_own_order(way):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    batches = make(way, statistics=(mean, std), crop_size=16)
    for epoch, split in ((batches.validation(), NOISE.validation), (batches.test(), NOISE.test)):
        assert epoch.images == len(split)
        images, numbers = joined(epoch)
        assert np.allclose(images.permute(0, 2, 3, 1), (split.images / 255 - mean) / std, atol=1e-5)
        assert numbers.tolist() == split.labels.tolist()
    assert torch.equal(joined(make("device").test())[0], joined(make("workers").test())[0])
    statistics = NOISE.statistics  # where none are given
    images = by_image(make(way, plain, statistics=None).test())
    assert np.allclose(images.permute(0, 2, 3, 1), (NOISE.test.images / 255 - statistics[0]) / statistics[1], atol=1e-5)


@both_ways
def test_the_policy_may_change_with_the_epoch(way):
    def policy(config, epoch, mean, std):
        return A.Compose([A.HorizontalFlip(p=1)] if epoch % 3 == 1 else [])

    batches = make(way, policy)
    expected = torch.from_numpy(NOISE.train.images).permute(0, 3, 1, 2).float()
    for epoch in (0, 1, 2, 1, 0):
        assert torch.equal(by_image(batches.train(epoch)), expected.flip(3) if epoch == 1 else expected)


@both_ways
def test_a_policy_may_end_in_tensors(way):
    made = by_image(make(way, lambda *_, **__: A.Compose([A.Normalize(*AS_THEY_ARE), ToTensorV2()])).train(0))
    assert np.array_equal(made.round().permute(0, 2, 3, 1), NOISE.train.images)


@pytest.mark.parametrize(("transform", "found"), [
    (A.RandomSizedCrop((20, 30), (24, 24), p=0.5), "24 x 24 x 3 and 32 x 32 x 3"),
    (A.ToGray(num_output_channels=1, p=1), "32 x 32")])
@pytest.mark.parametrize("epoch", [0, 79])
def test_a_policy_whose_images_fit_no_batch_is_an_error(transform, found, epoch):
    with pytest.raises(UserError, match=f"training images of epoch {epoch} in augmentation.py makes images of {found}, but"):
        make("workers", lambda config, at, **_: A.Compose([transform] if at == epoch else []))


def test_a_check_of_a_policy_changes_no_image():
    class InPlace(A.ImageOnlyTransform):
        def apply(self, img, **_):
            img[:] = 0
            return img

    before = NOISE.train.images.copy()
    make("workers", lambda *_, **__: A.Compose([InPlace(p=1)]))
    assert (NOISE.train.images == before).all()


@pytest.mark.parametrize("policy", [
    lambda mean, std: [A.Resize(64, 64), A.Normalize(mean, std)], lambda mean, std: [A.Normalize((0.5,) * 3, (0.5,) * 3)],
    lambda mean, std: [A.Normalize(normalization="image")], lambda mean, std: []])
def test_test_images_are_normalized_and_nothing_else(policy):
    """Because predict and export do no more."""
    with pytest.raises(UserError, match=r"test_policy in augmentation.py must be A.Normalize\(mean, std\) alone"):
        make_policies(Config(), NOISE.statistics, augmentation.train_policy, lambda *given: A.Compose(policy(*given)))


OLD = [
    (lambda: A.CoarseDropout(max_holes=1, max_height=16, max_width=16, fill_value=0),
     ["CoarseDropout takes no max_holes (now num_holes_range), max_height (now hole_height_range)", "fill_value (now fill)"]),
    (lambda: A.Affine(mode=1), ["Affine takes no mode (now border_mode)"]),
    (lambda: A.Normalize(deviation=0.5), ["Normalize takes no deviation"]),
    (lambda: A.RandomResizedCrop(height=32, width=32), ["size: Field required"]),
    (lambda: A.Cutout(8), ["there is no Cutout (now CoarseDropout)"])]


@pytest.mark.parametrize(("transform", "words"), OLD)
@pytest.mark.parametrize("epoch", [0, 79])
def test_what_albumentations_no_longer_has_is_an_error_that_names_it(transform, words, epoch):
    """It only warns of arguments that a transform doesn't take, and leaves them out."""
    with pytest.raises(UserError) as error:
        make("workers", lambda config, at, **_: A.Compose([transform()] if at == epoch else []))
    assert str(error.value).startswith("augmentation.py, line ")
    assert all(word in str(error.value) for word in words), error.value


def test_a_mistake_in_a_policy_keeps_its_traceback():
    for mistake in (lambda *_, **__: NOISE.nothing, lambda *_, **__: int("many")):
        with pytest.raises((AttributeError, ValueError)):
            make("workers", mistake)


# ---------------------------------------------------------------- auto, device, workers

def test_batches_are_made_where_the_config_says():
    assert isinstance(make("device"), DeviceBatches)
    assert isinstance(make("workers"), WorkerBatches)


def chosen(batches: str, train=augmentation.train_policy, test: A.Compose | None = None, device: str = "cpu") -> str:
    config = Config(batches=batches)
    policy, normalization = make_policies(config, NOISE.statistics, train, augmentation.test_policy)
    return choose_batches(config, NOISE, (policy, test or normalization), torch.device(device))


def test_auto_is_the_device_where_that_is_possible(capsys):
    assert [chosen(batches) for batches in ("auto", "device", "workers")] == ["device", "device", "workers"]
    assert capsys.readouterr().out == ""


NOISY = A.Compose([A.GaussNoise()])


@pytest.mark.parametrize(("given", "words"), [
    ({"train": lambda config, epoch, **_: NOISY if epoch == 0 else plain()}, "GaussNoise"),
    ({"train": lambda config, epoch, **_: NOISY if epoch == 79 else plain()}, "GaussNoise"),
    ({"test": NOISY}, "GaussNoise"), ({"device": "mps"}, "64-bit arithmetic")])
def test_auto_falls_back_to_workers_with_one_line_and_device_is_an_error(given, words, capsys):
    device = given.get("device", "cpu")
    assert chosen("auto", **given) == "workers"
    assert f"by workers: {words} can't run on whole batches on device {device}" in one_line(capsys.readouterr().out)
    with pytest.raises(UserError, match=f"--batches device can't run {words} .*: use --batches workers"):
        chosen("device", **given)
    assert chosen("workers", **given) == "workers"


def test_a_policy_of_one_epoch_that_cannot_run_on_the_device_is_an_error_then():
    batches = make("device", lambda config, epoch, **_: NOISY if epoch == 5 else plain())
    batches.train(4)
    with pytest.raises(UserError, match=r"augmentation\.py: GaussNoise can't run on whole batches: use --batches workers"):
        batches.train(5)


# ---------------------------------------------------------------- a run of the program

def test_a_run_says_which_policy_cannot_run_on_the_device_or_is_wrong(run, tmp_path, monkeypatch):
    def patched(policy) -> None:
        for module in ("main", "tinycnn.runs.inputs"):
            monkeypatch.setattr(f"{module}.train_policy", policy)

    for transform, words, flags in ((*OLD[0], []), (A.GaussNoise, ["--batches device can't run"], ["--batches", "device"])):
        patched(lambda *_, transform=transform, **__: A.Compose([transform()]))
        status, _, err = run("--epochs", "1", *flags)
        assert (status, words[0] in one_line(err)) == (2, True), err
        assert not list((tmp_path / "logs").glob("runs/*"))
    status, out, _ = run("--epochs", "1")
    assert status == 0
    assert sum("GaussNoise" in line for line in out.splitlines()) == 1
    assert read_run(only_run(tmp_path)).record["config"]["batches"] == "workers"
