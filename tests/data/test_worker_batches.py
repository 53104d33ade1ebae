"""Batches made by workers: functions of (seed, epoch, image), whatever the workers."""

import multiprocessing
import sys
import warnings

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import synthetic

from augmentation import test_policy as normalizing_policy
from augmentation import train_policy
from config import Config
from tinycnn.data import worker_batches
from tinycnn.data.dataset import Split
from tinycnn.data.randomness import AUGMENTATION, ORDER, random_stream
from tinycnn.data.worker_batches import WorkerBatches

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    data = synthetic()
    return {"train": Split(data.train.images[:70], data.train.labels[:70]),
            "test": Split(data.test.images[:25], data.test.labels[:25])}


def make(splits, config: Config | None = None, batch_size: int = 16, seed: int = 3, workers: int = 0) -> WorkerBatches:
    policies = {"train": train_policy(config or Config(), MEAN, STD), "test": normalizing_policy(MEAN, STD)}
    return WorkerBatches(splits, policies, batch_size, seed, workers)


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(joined(one), joined(other), strict=True))


def test_a_batch_is_what_the_network_takes(splits):
    batches = list(make(splits).shuffled("train", 0))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 16, 6]
    for images, labels in batches:
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_batches_are_float32_without_a_normalization_and_may_be_empty(splits):
    plain = {"train": A.Compose([])}
    (images, _), *_ = WorkerBatches({"train": splits["train"]}, plain, 70, 0, 0).in_order("train")
    assert images.dtype == torch.float32
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), splits["train"].images)
    nothing = WorkerBatches({"train": splits["train"]}, plain, 70, 0, 0, share_of=lambda _: slice(0))
    (images, labels), *_ = nothing.in_order("train")
    assert (images.shape, images.dtype, len(labels)) == ((0, 3, 32, 32), torch.float32, 0)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_bit(splits, workers):
    alone, many = make(splits), make(splits, workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for epoch in (0, 7):
                assert same(alone.shuffled("train", epoch), many.shuffled("train", epoch))
            assert same(alone.in_order("test"), many.in_order("test"))
        finally:
            many.close()
    assert not [str(warning.message) for warning in caught if "fork" in str(warning.message)]


@pytest.mark.parametrize(("default", "version", "expected"), [
    ("fork", (3, 11), "fork"), ("fork", (3, 12), "forkserver"), ("fork", (3, 13), "forkserver"),
    ("forkserver", (3, 14), "forkserver"), ("spawn", (3, 11), "spawn"), ("spawn", (3, 13), "spawn")])
def test_workers_are_not_forked_from_python_3_12_on(monkeypatch, default, version, expected):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_, **__: default)
    monkeypatch.setattr(sys, "version_info", version)
    method = worker_batches._start_method()
    monkeypatch.undo()
    assert method == expected


@pytest.mark.parametrize("method", [method for method in ("spawn", "forkserver")
                                    if method in multiprocessing.get_all_start_methods()])
def test_workers_that_are_not_forked_share_the_images_and_give_the_same_bits(splits, monkeypatch, method):
    """As on macOS, on Windows and from Python 3.12 on."""
    monkeypatch.setattr(worker_batches, "_start_method", lambda: method)
    many = make(splits, workers=1)
    dataset = many.loader.dataset
    assert all(tensor.is_shared() for tensors in (dataset.images, dataset.labels) for tensor in tensors.values())
    assert many.loader.multiprocessing_context.get_start_method() == method
    try:
        assert same(make(splits).shuffled("train", 1), many.shuffled("train", 1))
    finally:
        many.close()


def test_an_image_depends_on_seed_epoch_and_image_alone(splits):
    """Not on the batch size, nor on what ran before; and each of the three matters."""
    images, labels = joined(make(splits).shuffled("train", 4))
    order = random_stream(3, ORDER, 4).permutation(70)
    by_image = images[torch.from_numpy(np.argsort(order))]

    other = make(splits, batch_size=70)
    joined(other.shuffled("train", 9))
    again, again_labels = joined(other.shuffled("train", 4))
    assert torch.equal(images, again)
    assert torch.equal(labels, again_labels)

    alone = make(splits).loader.dataset[("train", 4, np.array([33]))]
    assert torch.equal(alone[0][0], by_image[33])
    assert not torch.equal(images, joined(make(splits, seed=4).shuffled("train", 4))[0])
    assert not torch.equal(images, joined(make(splits).shuffled("train", 5))[0])


@pytest.mark.parametrize("changes", [{"flip_p": 0.5}, {"affine_p": 1.0}, {"coarse_dropout_p": 1.0, "coarse_dropout_size": 4},
                                     {"crop_padding": 4}])
def test_every_transform_draws_from_seed_epoch_and_image(splits, changes):
    config = Config(**{"flip_p": 0.0, "affine_p": 0.0, "coarse_dropout_p": 0.0} | changes)

    def augmented(seed: int, epoch: int) -> torch.Tensor:
        return make(splits, config, seed=seed).loader.dataset[("train", epoch, np.arange(70))][0]

    first = augmented(3, 1)
    assert torch.equal(first, augmented(3, 1))
    for seed, epoch in ((4, 1), (3, 2)):
        assert (first != augmented(seed, epoch)).flatten(1).any(1).float().mean() > 0.25


def test_an_epoch_has_every_image_once_in_a_new_order(splits):
    nothing = Config(flip_p=0, affine_p=0, coarse_dropout_p=0)
    first, second = (joined(make(splits, nothing).shuffled("train", epoch))[0] for epoch in (0, 1))
    assert not torch.equal(first, second)
    images = splits["train"].images.astype(np.float32)
    expected = (images / 255 - np.float32(MEAN)) / np.float32(STD)
    for epoch in (first, second):
        found = sorted(image.permute(1, 2, 0).numpy().round(3).tobytes() for image in epoch)
        assert np.allclose(np.sort(epoch.permute(0, 2, 3, 1).numpy().ravel()), np.sort(expected.ravel()), atol=1e-5)
        assert len(set(found)) == 70


def test_random_streams_differ_in_every_argument_and_repeat():
    draws = {random_stream(*key).integers(2**63) for key in
             [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**32 - 1, AUGMENTATION, 99_999, 10**7)]}
    assert len(draws) == 6
    assert random_stream(5, 1, 2, 3).integers(2**63) == random_stream(5, 1, 2, 3).integers(2**63)


def test_the_test_policy_only_normalizes(splits):
    images, labels = joined(make(splits).in_order("test"))
    expected = (splits["test"].images / 255 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert labels.tolist() == splits["test"].labels.tolist()
