"""Datasets in memory: the built-in set, statistics, the validation split."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import synthetic

from config import SIDE, UserError
from tinycnn.data.dataset import Dataset, Split, empty_split
from tinycnn.data.synthetic import draw


def assert_whole(data: Dataset, classes: int):
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split), 32, 32, 3)
        assert split.labels.dtype == np.int64
        assert set(split.labels) == set(range(classes))
    assert len(data.class_names) == classes
    assert len(data.validation) == 0


def test_the_built_in_set_is_whole_and_always_the_same():
    data = synthetic()
    assert_whole(data, 10)
    assert (len(data.train), len(data.test)) == (5000, 1000)
    assert set(np.bincount(data.train.labels)) == {500}
    one, again, other = draw(100, key=1), draw(100, key=1), draw(100, key=2)
    assert np.array_equal(one.images, again.images)
    assert np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.images, other.images)


def test_the_shapes_are_as_large_as_ever():
    """Runs on them are compared with those of other versions."""
    data = synthetic()
    contrast = abs(data.train.images - data.train.images[:, :1, :1].astype(float)).mean((1, 2, 3))
    assert [contrast[data.train.labels == label].mean() for label in range(10)] == pytest.approx(
        [42.7, 30.8, 40.15, 33.11, 27.65, 28.13, 34.7, 30.61, 30.58, 30.24], abs=0.01)


def test_the_built_in_set_can_be_told_apart_by_shape_not_by_colour():
    """A nearest-neighbour search on shapes finds the class far above chance; on mean colours it doesn't."""
    data = synthetic()

    def accuracy(features):
        train, test = features(data.train.images[:2000]), features(data.test.images[:300])
        nearest = ((train ** 2).sum(1) - 2 * test @ train.T).argmin(1)
        return (data.train.labels[nearest] == data.test.labels[:300]).mean()

    def shape(pixels):
        grey = abs(pixels.astype(np.float32) - pixels[:, :1, :1]).mean(3).reshape(len(pixels), 16, 2, 16, 2).mean((2, 4))
        flat = grey.reshape(len(pixels), -1)
        return (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)

    assert accuracy(shape) > 0.3
    assert accuracy(lambda pixels: pixels.mean((1, 2))) < 0.2


@pytest.mark.parametrize("count", [1, 5000, 20_000])
def test_statistics_are_exact(count):
    """As by integers without a limit. Of 20,000 images with one value, more pixels are alike than float32 can count."""
    images = np.full((count, SIDE, SIDE, 3), 77, dtype=np.uint8)
    images[0] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    split = Split(images, np.zeros(count, dtype=np.int64))
    mean, std = Dataset("folder", ("one",), split, split, empty_split()).statistics
    pixels = SIDE * SIDE * count
    for channel in range(3):
        values = images[0, :, :, channel].ravel().tolist()
        total = sum(values) + 77 * SIDE * SIDE * (count - 1)
        squares = sum(value * value for value in values) + 77 * 77 * SIDE * SIDE * (count - 1)
        assert mean[channel] == total / (255 * pixels)
        assert std[channel] == max(math.sqrt(squares * pixels - total * total) / (255 * pixels), 1 / 255)


def test_the_fingerprint_sees_pixels_labels_and_class_names():
    data = Dataset("synthetic", ("one", "two"), draw(30, key=1), draw(20, key=2), draw(10, key=3))
    seen = {data.fingerprint}
    for name in ("train", "test", "validation"):
        split = getattr(data, name)
        images, labels = split.images.copy(), split.labels.copy()
        images[0, 0, 0, 0] ^= 1
        labels[0] += 1
        seen |= {dataclasses.replace(data, **{name: changed}).fingerprint
                 for changed in (Split(images, split.labels), Split(split.images, labels))}
    seen.add(dataclasses.replace(data, class_names=data.class_names[::-1]).fingerprint)
    assert len(seen) == 8


# ---------------------------------------------------------------- validation

def test_validation_is_class_balanced_fixed_and_leaves_no_image_out():
    data = synthetic()
    held = data.hold_out(503)
    assert np.bincount(held.validation.labels).tolist() == [51] * 3 + [50] * 7
    assert len(held.train) == 5000 - 503
    both = np.concatenate([held.train.images, held.validation.images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in data.train.images)
    assert held.fingerprint == data.hold_out(503).fingerprint
    assert data.hold_out(0) is data
    with pytest.raises(UserError, match=r"disc has only 500 training images; lower --validation"):
        data.hold_out(5000)


def test_validation_is_drawn_from_all_over_each_class_and_never_changes():
    """The numbers are those of the first release: another draw would make runs of before incomparable."""
    count = 2000
    images = np.zeros((count, SIDE, SIDE, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(count), 256)
    data = Dataset("folder", ("one", "two"), Split(images, np.arange(count) % 2), empty_split(), empty_split())
    held = data.hold_out(200).validation.images[:, 0, 0].astype(int)
    places = held[:, 0] * 256 + held[:, 1]
    assert places[:12].tolist() == [23, 24, 26, 27, 28, 36, 56, 66, 81, 89, 112, 117]
    assert 80 < (places < count // 2).sum() < 120
