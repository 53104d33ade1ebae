"""What the policies do to images, transform by transform."""

import warnings

import cv2
import numpy as np
import pytest
import torch
from conftest import synthetic
from test_worker_batches import MEAN, STD, joined, make

from augmentation import train_policy
from config import Config
from tinycnn.data.batches import make_batches, make_policies
from tinycnn.data.dataset import Images, Split, empty_split
from tinycnn.data.device_batches import DeviceBatches


def augmented(image: np.ndarray, count: int = 400, **changes) -> np.ndarray:
    """`count` augmented copies of `image`, float, in 0 to 255; all transforms off but those in `changes`."""
    config = Config(**({"flip_p": 0.0, "affine_p": 0.0, "coarse_dropout_p": 0.0} | changes))
    copies = Split(np.repeat(image[None], count, 0), np.zeros(count, np.int64))
    images, _ = joined(make({"train": copies, "test": copies}, config, batch_size=count).in_order("train"))
    return (images.permute(0, 2, 3, 1).numpy() * STD + MEAN) * 255


def test_flips_mirror_about_half():
    image = synthetic().train.images[0]
    out = augmented(image, flip_p=0.5)
    mirrored = np.isclose(out, image[:, ::-1], atol=0.01).all((1, 2, 3))
    assert (mirrored | np.isclose(out, image, atol=0.01).all((1, 2, 3))).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_coarse_dropout_fills_one_square_with_the_mean():
    image = np.full((32, 32, 3), 200, np.uint8)
    out = augmented(image, coarse_dropout_p=0.5, coarse_dropout_size=16)
    holes = (abs(out - 200) > 1).any(3)
    sizes = holes.sum((1, 2))
    assert set(sizes) == {0, 256}
    assert 0.4 < (sizes > 0).mean() < 0.6
    assert np.allclose(out[holes], [128, 102, 76], atol=0.01)  # the mean, rounded as a pixel is
    hole = holes[sizes > 0][0]
    assert hole.any(0).sum() == hole.any(1).sum() == 16


def test_affine_moves_the_picture_within_its_limits():
    image = np.zeros((32, 32, 3), np.uint8)
    image[12:20, 12:20] = 255
    out = augmented(image, affine_p=1.0, shift=0.0625, scale=0.1, rotate=15.0)[..., 0]
    rows, columns = np.mgrid[:32, :32]
    weight = out.sum((1, 2))
    middle = np.stack([(out * rows).sum((1, 2)) / weight, (out * columns).sum((1, 2)) / weight])
    assert abs(middle - 15.5).max() < 1.1   # whole pixels, rounded towards zero
    assert abs(middle - 15.5).max() > 0.9
    assert 0.75 < weight.min() / (64 * 255) < 0.9  # (1 - 0.1) squared
    assert 1.1 < weight.max() / (64 * 255) < 1.3   # (1 + 0.1) squared


def test_the_border_is_reflected_not_filled():
    image = np.full((32, 32, 3), 77, np.uint8)
    assert np.allclose(augmented(image, affine_p=1.0, rotate=45.0), 77, atol=0.01)


def test_a_transform_of_probability_0_is_left_out_and_none_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = train_policy(Config(flip_p=0, coarse_dropout_p=0), MEAN, STD)
        assert [type(transform).__name__ for transform in train_policy(Config(), MEAN, STD)] == [
            "HorizontalFlip", "Affine", "CoarseDropout", "Normalize"]
    assert [type(transform).__name__ for transform in policy] == ["Affine", "Normalize"]
    assert policy[0].border_mode == cv2.BORDER_REFLECT_101


@pytest.mark.parametrize("padding", [2, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_crop_moves_the_image_by_up_to_the_padding(padding, on_device):
    """A dark row and column on bright ground are found within `padding` of their places, and each of these places is used."""
    image = np.full((32, 32, 3), 200, np.uint8)
    image[16, :, 0] = image[:, 16, 1] = 0
    config = Config(flip_p=0.0, affine_p=0.0, coarse_dropout_p=0.0, crop_padding=padding)
    copies = Split(np.repeat(image[None], 1000, 0), np.zeros(1000, np.int64))
    if on_device:
        batches = DeviceBatches({"train": copies}, {"train": train_policy(config, MEAN, STD)}, 500, 0, torch.device("cpu"))
    else:
        batches = make({"train": copies, "test": copies}, config, batch_size=500)
    images = joined(batches.in_order("train"))[0]
    down = images[:, 0, :, 0].argmin(1) - 16
    right = images[:, 1, 0, :].argmin(1) - 16
    places = set(zip(down.tolist(), right.tolist(), strict=True))
    every = range(-padding, padding + 1)
    assert places == {(y, x) for y in every for x in every}


@pytest.mark.parametrize("batches", ["device", "workers"])
def test_a_small_crop_is_a_window_of_the_image_and_the_last_epochs_have_whole_ones(batches):
    image = np.stack([*np.mgrid[0:32, 0:32], np.zeros((32, 32))], axis=2).astype(np.uint8)  # each pixel says where it is
    split = Split(np.repeat(image[None], 1000, 0), np.zeros(1000, np.int64))
    images = Images("synthetic", ("one",), split, split, empty_split())
    config = Config(flip_p=0.0, affine_p=0.0, coarse_dropout_p=0.0, crop_size=24, uncropped_share=0.2, batches=batches,
                    workers=0)
    made = make_batches(config, images, make_policies(config, (0.0,) * 3, (1 / 255,) * 3), torch.device("cpu"))
    cropped = joined(made.in_order("train"))[0].round().long()
    assert cropped.shape == (1000, 3, 24, 24)
    assert cropped.is_contiguous(memory_format=torch.channels_last)
    window = torch.from_numpy(image[:24, :24]).permute(2, 0, 1)
    assert torch.equal(cropped - cropped[:, :, :1, :1], window.expand(1000, 3, 24, 24))
    assert set(map(tuple, cropped[:, :2, 0, 0].tolist())) == {(top, left) for top in range(9) for left in range(9)}
    whole = joined(made.in_order("uncropped"))[0].round().long()
    assert torch.equal(whole, torch.from_numpy(image).permute(2, 0, 1).expand(1000, 3, 32, 32))


@pytest.mark.parametrize("batches", ["device", "workers"])
def test_a_hole_is_at_most_as_large_as_the_crop(batches):
    image = np.full((32, 32, 3), 200, np.uint8)
    split = Split(image[None], np.zeros(1, np.int64))
    images = Images("synthetic", ("one",), split, split, empty_split())
    config = Config(affine_p=0.0, crop_size=16, coarse_dropout_p=1.0, coarse_dropout_size=32, batches=batches, workers=0)
    made = make_batches(config, images, make_policies(config, (0.2,) * 3, (1 / 255,) * 3), torch.device("cpu"))
    assert joined(made.in_order("train"))[0].round().eq(0).all()
