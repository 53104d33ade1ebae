"""What the policies do to images, transform by transform."""

import warnings

import numpy as np
import pytest
import torch
from test_batches import AS_THEY_ARE, both_ways, by_image, make

from augmentation import train_policy
from config import Config
from tinycnn.data.dataset import Dataset, Split

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OFF = {"flip_p": 0.0, "affine_p": 0.0, "coarse_dropout_p": 0.0}


def augmented(way: str, image: np.ndarray, count: int = 400, epoch: int = 0, statistics=AS_THEY_ARE, **changes) -> np.ndarray:
    """`count` augmented copies of `image`, float, in 0 to 255; all transforms off but those in `changes`."""
    copies = Split(np.repeat(image[None], count, 0), np.arange(count))
    batches = make(way, dataset=Dataset("folder", ("any",), copies, copies, copies), statistics=statistics,
                   **OFF | {"batch_size": count} | changes)
    made = by_image(batches.train(epoch)).permute(0, 2, 3, 1).numpy()
    return (made * np.array(statistics[1]) + np.array(statistics[0])) * 255


@both_ways
def test_flips_mirror_about_half(way):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    made = augmented(way, image, flip_p=0.5)
    mirrored, as_it_was = (np.isclose(made, each, atol=0.01).all((1, 2, 3)) for each in (image[:, ::-1], image))
    assert (mirrored | as_it_was).all()
    assert 0.4 < mirrored.mean() < 0.6


@both_ways
def test_coarse_dropout_fills_one_square_with_the_mean(way):
    image = np.full((32, 32, 3), 200, np.uint8)
    made = augmented(way, image, statistics=(MEAN, STD), coarse_dropout_p=0.5, coarse_dropout_size=16)
    holes = (abs(made - 200) > 1).any(3)
    sizes = holes.sum((1, 2))
    assert set(sizes) == {0, 256}
    assert 0.4 < (sizes > 0).mean() < 0.6
    assert np.allclose(made[holes], [128, 102, 76], atol=0.01)  # the mean, rounded as a pixel is
    hole = holes[sizes > 0][0]
    assert hole.any(0).sum() == hole.any(1).sum() == 16
    assert not augmented(way, image, 9, crop_size=16, coarse_dropout_p=1.0, coarse_dropout_size=32).round().any()  # the crop's


@both_ways
def test_affine_moves_the_picture_within_its_limits_and_either_way(way):
    image = np.zeros((32, 32, 3), np.uint8)
    image[12:20, 12:20] = 255
    made = augmented(way, image, affine_p=1.0, shift=0.0625, scale=0.1, rotate=15.0)[..., 0]
    rows, columns = np.mgrid[:32, :32]
    weight = made.sum((1, 2))
    for moved in ((made * places).sum((1, 2)) / weight - 15.5 for places in (rows, columns)):
        assert -1.1 < moved.min() < -0.9  # whole pixels, rounded towards zero
        assert 0.9 < moved.max() < 1.1
    assert 0.75 < weight.min() / (64 * 255) < 0.9  # (1 - 0.1) squared
    assert 1.1 < weight.max() / (64 * 255) < 1.3   # (1 + 0.1) squared


@both_ways
def test_affine_rotates_either_way_up_to_its_limit(way):
    image = np.zeros((32, 32, 3), np.uint8)
    image[14:18, 26:30] = 255  # to the right of the centre
    made = augmented(way, image, affine_p=1.0, shift=0.0, scale=0.0, rotate=15.0)[..., 0]
    rows, columns = np.mgrid[:32, :32] - 15.5
    angles = np.degrees(np.arctan2((made * rows).sum((1, 2)), (made * columns).sum((1, 2))))
    assert -16 < angles.min() < -14
    assert 14 < angles.max() < 16
    assert 0.4 < (angles > 0).mean() < 0.6


@both_ways
def test_the_border_is_reflected_not_filled(way):
    image = np.full((32, 32, 3), 77, np.uint8)
    assert np.allclose(augmented(way, image, affine_p=1.0, rotate=45.0), 77, atol=0.01)
    image[:, 1] = 200  # beside the edge, which isn't repeated
    shifted = augmented(way, image, affine_p=1.0, scale=0.0, rotate=0.0, shift=0.0625)[:, 0, :2, 0].round()
    assert set(map(tuple, shifted)) == {(77, 200), (200, 77)}  # by -1, by 0, by 1


def test_a_transform_of_probability_0_is_left_out_and_none_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, part = (train_policy(Config(**changes), 0, MEAN, STD) for changes in ({}, {"flip_p": 0, "coarse_dropout_p": 0}))
    assert [type(each).__name__ for each in whole] == ["HorizontalFlip", "Affine", "CoarseDropout", "Normalize"]
    assert [type(each).__name__ for each in part] == ["Affine", "Normalize"]


@both_ways
@pytest.mark.parametrize("padding", [2, 4])
def test_a_crop_moves_the_image_by_up_to_the_padding(way, padding):
    """A dark row and column on bright ground are found within `padding` of their places, and each of these places is used."""
    image = np.full((32, 32, 3), 200, np.uint8)
    image[16, :, 0] = image[:, 16, 1] = 0
    made = augmented(way, image, 1000, crop_padding=padding)
    down, right = made[:, :, 0, 0].argmin(1) - 16, made[:, 0, :, 1].argmin(1) - 16
    every = range(-padding, padding + 1)
    assert set(zip(down.tolist(), right.tolist(), strict=True)) == {(y, x) for y in every for x in every}


@both_ways
def test_a_small_crop_is_a_window_of_the_image(way):
    image = np.stack([*np.mgrid[0:32, 0:32], np.zeros((32, 32))], axis=2).astype(np.uint8)  # each pixel says where it is
    made = augmented(way, image, 800, crop_size=24).round().astype(int)
    assert (made - made[:, :1, :1] == image[:24, :24]).all()
    assert set(map(tuple, made[:, 0, 0, :2].tolist())) == {(top, left) for top in range(9) for left in range(9)}


@both_ways
@pytest.mark.parametrize(("share", "crops"), [(0.2, 8), (0.0, 10), (0.04, 10), (1.0, 0)])
def test_the_last_epochs_have_whole_images_without_padding(way, share, crops):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for epoch in {0, 7, 8, 9}:
        made = augmented(way, image, 8, epoch, crop_size=24, crop_padding=4, epochs=10, whole_images_share=share)
        side = 24 if epoch < crops else 32
        assert made.shape == (8, side, side, 3)
        assert side == 24 or np.allclose(made, image, atol=0.01)


def test_images_with_a_crop_are_in_channels_last_memory():
    images, _ = next(iter(make("device", crop_size=24).train(0)))
    assert images.is_contiguous(memory_format=torch.channels_last)
