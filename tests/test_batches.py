import multiprocessing
import warnings

import cv2
import numpy as np
import pytest
import torch

from config import Config
from training.augment import test_policy as normalizing_policy
from training.augment import train_policy
from training.batches import AUGMENTATION, ORDER, Batches, random_stream
from training.images import Split, synthetic

MEAN, DEVIATION = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    data = synthetic()
    return {"train": Split(data.train.images[:70], data.train.labels[:70]),
            "test": Split(data.test.images[:25], data.test.labels[:25])}


def make(splits, config: Config | None = None, batch_size: int = 16, seed: int = 3, workers: int = 0) -> Batches:
    policies = {"train": train_policy(config or Config(), MEAN, DEVIATION), "test": normalizing_policy(MEAN, DEVIATION)}
    return Batches(splits, policies, batch_size, seed, workers)


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


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_no_bit(splits, workers):
    alone, many = make(splits), make(splits, workers=workers)
    try:
        for epoch in (0, 7):
            assert same(alone.shuffled("train", epoch), many.shuffled("train", epoch))
        assert same(alone.in_order("test"), many.in_order("test"))
    finally:
        many.close()


def test_spawned_workers_share_the_images_and_give_the_same_bits(splits, monkeypatch):
    """As on macOS, on Windows and from Python 3.14 on."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_, **__: "spawn")
    many = make(splits, workers=1)
    many.loader.multiprocessing_context = "spawn"
    assert all(tensor.is_shared() for tensor in many.loader.dataset.images.values())
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


def test_an_epoch_has_every_image_once_in_a_new_order(splits):
    nothing = Config(flip_p=0, affine_p=0, coarse_dropout_p=0)
    first, second = (joined(make(splits, nothing).shuffled("train", epoch))[0] for epoch in (0, 1))
    assert not torch.equal(first, second)
    images = splits["train"].images.astype(np.float32)
    expected = (images / 255 - np.float32(MEAN)) / np.float32(DEVIATION)
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
    expected = (splits["test"].images / 255 - np.array(MEAN)) / np.array(DEVIATION)
    assert np.allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert labels.tolist() == splits["test"].labels.tolist()


# ---------------------------------------------------------------- the policy, step by step

def augmented(image: np.ndarray, count: int = 400, **changes) -> np.ndarray:
    """`count` augmented copies of `image`, float, in 0 to 255; all steps off but those in `changes`."""
    config = Config(**({"flip_p": 0.0, "affine_p": 0.0, "coarse_dropout_p": 0.0} | changes))
    copies = Split(np.repeat(image[None], count, 0), np.zeros(count, np.int64))
    images, _ = joined(make({"train": copies, "test": copies}, config, batch_size=count).in_order("train"))
    return (images.permute(0, 2, 3, 1).numpy() * DEVIATION + MEAN) * 255


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


def test_a_step_of_probability_0_is_left_out_and_none_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = train_policy(Config(flip_p=0, coarse_dropout_p=0), MEAN, DEVIATION)
        assert [type(step).__name__ for step in train_policy(Config(), MEAN, DEVIATION)] == [
            "HorizontalFlip", "Affine", "CoarseDropout", "Normalize"]
    assert [type(step).__name__ for step in policy] == ["Affine", "Normalize"]
    assert policy[0].border_mode == cv2.BORDER_REFLECT_101
