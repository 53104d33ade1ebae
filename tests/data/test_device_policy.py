"""Policies on whole batches are Albumentations' own: the same pixels from the same parameters, the same parameters in
distribution."""

import platform
import re

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from scipy.stats import ks_2samp
from torch.nn import functional as F

from augmentation import train_policy
from config import Config
from tinycnn.data.device_policy import DevicePolicy, Unsupported
from tinycnn.data.packed_images import pack, unpack

CPU = torch.device("cpu")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
DRAWS, THEIR_DRAWS = 10_000, 3_000  # Albumentations takes long for each
# OpenCV's x86-64 builds interpolate in fixed point, as the device does. What another build rounds otherwise is bounded:
# a coordinate is off by 1/64 pixel + 1/1024, on two axes, and a pixel's neighbour differs by at most 255; both may be off.
AFFINE_BOUND = 0 if platform.machine() in ("x86_64", "AMD64") else 2 * (2 * 255 * (1 / 64 + 1 / 1024) + 0.5)

GEOMETRY = {
    "flip": A.HorizontalFlip(p=0.5),
    "affine, constant": A.Affine(translate_percent=(-0.2, 0.3), scale=(0.6, 1.5), rotate=(-90, 180), shear=(-20, 10),
                                 fill=(10, 200, 30), p=1),
    "affine, reflected": A.Affine(translate_percent={"x": (-0.5, 0.5), "y": (0, 0.1)}, scale={"x": (0.3, 1), "y": (1, 2)},
                                  rotate=(-15, 15), border_mode=cv2.BORDER_REFLECT, p=0.7),
    "affine, reflected 101": A.Affine(translate_px=(-40, 40), scale=(0.5, 1.2), rotate=(-15, 15), keep_ratio=True,
                                      border_mode=cv2.BORDER_REFLECT_101, p=0.5),
    "dropout in pixels": A.CoarseDropout((1, 3), (4, 16), (8, 40), fill=(125, 123, 114), p=0.5),
    "dropout in fractions": A.CoarseDropout((2, 2), (0.1, 0.5), (0.2, 0.9), fill=7.8, p=0.9),
    "crop": A.RandomCrop(24, 32),
}
with pytest.warns(UserWarning, match="special case of Affine"):
    GEOMETRY["shift, scale, rotate"] = A.ShiftScaleRotate(border_mode=cv2.BORDER_REFLECT_101, p=0.5)


def whole_policy(**changes: float) -> A.Compose:
    return train_policy(Config(**changes), 0, MEAN, STD)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """64 images of noise, on which no wrong pixel can hide."""
    return np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


def uniform(count: int, draws: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, draws)))


def on_device(policy: A.Compose, height: int = 32, width: int = 32) -> DevicePolicy:
    return DevicePolicy(policy, height, width, CPU)


def their_parameters(transform: A.BasicTransform, applied: dict | None) -> torch.Tensor:
    """What Albumentations sampled for one image (None: not applied), in our form, with 1 in front."""
    if isinstance(transform, A.HorizontalFlip):
        return torch.tensor([applied is not None])
    if isinstance(transform, A.Affine):
        return torch.tensor(np.eye(3)[:2] if applied is None else applied["matrix"][:2])[None]
    if isinstance(transform, A.PadIfNeeded):
        return torch.zeros(1, 0)
    if isinstance(transform, A.RandomCrop):
        left, top, *_ = applied["crop_coords"]
        return torch.tensor([[top, left]], dtype=torch.int32)
    holes = torch.zeros(1, transform.num_holes_range[1], 4, dtype=torch.int32)
    if applied is not None:
        holes[0, :len(applied["holes"])] = torch.from_numpy(applied["holes"])
    return holes


def replayed(policy: A.Compose, image: np.ndarray) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Albumentations' result for one image, and what it sampled for it."""
    done = policy(image=image)
    applied = dict(done["applied_transforms"])
    transforms = [transform for transform in policy.transforms if not isinstance(transform, (A.Normalize, ToTensorV2))]
    return done["image"], [their_parameters(transform, applied.get(type(transform).__name__)) for transform in transforms]


# ---------------------------------------------------------------- the same pixels

@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", GEOMETRY)
def test_the_pixels_are_albumentations_own(name, height, width):
    if name == "crop" and width == 40:
        pytest.skip("is tested with the padding")
    policy = A.Compose([GEOMETRY[name]], seed=1, save_applied_params=True)
    device, changed = on_device(policy, height, width), 0
    for image in np.random.default_rng(0).integers(0, 256, (64, height, width, 3), dtype=np.uint8):
        theirs, parameters = replayed(policy, image)
        ours = device(torch.from_numpy(image)[None], parameters)[0].permute(1, 2, 0).numpy()
        bound = AFFINE_BOUND if isinstance(GEOMETRY[name], A.Affine) else 0
        assert np.abs(ours - theirs).max() <= bound
        changed += ours.shape != image.shape or not np.array_equal(ours, image)
    assert 10 < changed <= 64


@pytest.mark.parametrize("border", [cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT, cv2.BORDER_REFLECT_101])
@pytest.mark.parametrize("position", ["center", "top_left", "bottom_right"])
def test_padding_and_cropping_are_albumentations_own(border, position, images):
    pad = A.PadIfNeeded(45, 36, position=position, border_mode=border, fill=(1, 2, 3))
    device = on_device(A.Compose([pad, A.RandomCrop(32, 30)]))
    corners = torch.tensor([[0, 0], [13, 6], [4, 5]], dtype=torch.int32)
    padded = device.transforms[0](pack(torch.from_numpy(images[:3])), corners[:, :0])
    ours = unpack(device.transforms[1](padded, corners)).numpy()
    for image, (top, left), own in zip(images, corners.tolist(), ours, strict=False):
        assert np.array_equal(own, pad(image=image)["image"][top:top + 32, left:left + 30])


@pytest.mark.parametrize(("changes", "end"), [({}, []), ({"crop_padding": 4}, [ToTensorV2()])])
def test_the_whole_train_policy_is_albumentations_own(changes, end, images):
    policy = A.Compose([*whole_policy(**changes).transforms, *end], seed=1, save_applied_params=True)
    device = on_device(policy)
    for image in images:
        theirs, parameters = replayed(policy, image)
        ours = device(torch.from_numpy(image)[None], parameters)[0]
        theirs = torch.from_numpy(theirs).permute(2, 0, 1) if not end else theirs
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= AFFINE_BOUND / 255 / min(STD)


def test_the_interpolation_stays_within_its_bound_of_the_exact_one(images):
    affine = on_device(A.Compose([GEOMETRY["affine, reflected 101"]])).transforms[0]
    matrices = affine.sample(uniform(64, affine.draws))
    matrices[:, :, 2] += 0.123  # no whole pixels
    inverse = torch.linalg.inv(torch.cat([matrices, torch.tensor([[[0, 0, 1.0]]]).double().expand(64, 1, 3)], 1))[:, :2]
    places = torch.stack([*torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="xy"), torch.ones(32, 32)], -1)
    grid = torch.einsum("nij,yxj->nyxi", inverse, places.double()) / 15.5 - 1
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    exact = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=True)
    ours = unpack(affine(pack(torch.from_numpy(images)), matrices)).permute(0, 3, 1, 2)
    error = (ours - exact).abs()
    assert 1 < error.max() <= 2 * 255 * (1 / 64 + 1 / 1024) + 0.5
    assert error.mean() < 1.5


# ---------------------------------------------------------------- the same distribution

def sampled_by_albumentations(transform: A.BasicTransform) -> np.ndarray:
    """THEIR_DRAWS x numbers: what it samples for images of 28 x 36 when it is applied."""
    transform.set_random_seed(3)
    shape = {"shape": (28, 36, 3)}
    drawn = (their_parameters(transform, transform.get_params_dependent_on_data(shape, {})) for _ in range(THEIR_DRAWS))
    return torch.cat(list(drawn)).flatten(1).double().numpy()


def sampled_on_device(transform: A.BasicTransform, count: int, seed: int = 0) -> np.ndarray:
    ours = on_device(A.Compose([transform]), 28, 36).transforms[0]
    numbers = uniform(count, ours.draws, seed)
    if not isinstance(transform, A.RandomCrop):  # which has no p
        numbers[:, 0] = 0  # so it is applied
    return ours.sample(numbers).flatten(1).double().numpy()


def least_p_value(one: np.ndarray, other: np.ndarray) -> float:
    """Of the Kolmogorov-Smirnov tests of all numbers sampled, and of each two's sums and differences, which see how they go
    together."""
    pairs = [(i, j, sign) for i in range(one.shape[1]) for j in range(i + 1) for sign in ((1, -1) if i != j else (1,))]
    return min(ks_2samp(one[:, i] + sign * one[:, j], other[:, i] + sign * other[:, j]).pvalue for i, j, sign in pairs)


@pytest.mark.parametrize("name", [name for name in GEOMETRY if name != "flip"])
def test_the_parameters_have_albumentations_distribution(name):
    assert least_p_value(sampled_by_albumentations(GEOMETRY[name]), sampled_on_device(GEOMETRY[name], DRAWS)) > 1e-4


@pytest.mark.parametrize(("one", "other"), [
    (A.Affine(rotate=(-15, 15)), A.Affine(rotate=(-17, 17))),
    (A.Affine(scale=(0.9, 1.1), keep_ratio=True), A.Affine(scale=(0.9, 1.1))),
    (A.CoarseDropout((1, 1), (16, 16), (16, 16)), A.CoarseDropout((1, 1), (15, 16), (16, 16))),
    (A.RandomCrop(24, 24), A.RandomCrop(24, 25))])
def test_another_distribution_would_be_noticed(one, other):
    assert least_p_value(sampled_on_device(one, THEIR_DRAWS, seed=1), sampled_on_device(other, DRAWS)) < 1e-6


def test_transforms_draw_numbers_of_their_own():
    one, other = on_device(A.Compose(2 * [A.HorizontalFlip(p=0.5)])).sample(uniform(DRAWS, 2))
    assert abs((one == other).double().mean() - 0.5) < 4 * 0.5 / DRAWS ** 0.5


@pytest.mark.parametrize("name", [name for name in GEOMETRY if name != "crop"])
def test_a_transform_is_applied_as_often_as_its_p_says(name, images):
    device = on_device(A.Compose([GEOMETRY[name]]))
    numbers = uniform(DRAWS, device.draws)
    [parameters] = device.sample(numbers)
    if isinstance(GEOMETRY[name], A.CoarseDropout):
        first = parameters[:, 0].double()
        applied = (first[:, 2] > first[:, 0]) & (first[:, 3] > first[:, 1])
    elif isinstance(GEOMETRY[name], A.Affine):
        applied = (parameters != torch.eye(2, 3)).flatten(1).any(1)
    else:
        applied = parameters
    p = GEOMETRY[name].p
    assert abs(applied.double().mean() - p) <= 4 * (p * (1 - p) / DRAWS) ** 0.5


# ---------------------------------------------------------------- what it can't do

@pytest.mark.parametrize(("transforms", "words"), [
    ([A.GaussNoise()], "GaussNoise"),
    ([A.OneOf([A.HorizontalFlip()])], "OneOf"),
    ([A.Affine(interpolation=cv2.INTER_CUBIC)], "Affine with interpolation=2"),
    ([A.Affine(fit_output=True)], "Affine with fit_output=True"),
    ([A.Affine(border_mode=cv2.BORDER_WRAP)], "Affine with border_mode=3"),
    ([A.CoarseDropout(fill="random")], "CoarseDropout with fill='random'"),
    ([A.CoarseDropout(fill=(9,))], "CoarseDropout with fill=(9.0,)"),
    ([A.Affine(fill=(9, 9))], "Affine with fill=(9.0, 9.0)"),
    ([A.PadIfNeeded(40, 40, position="random")], "PadIfNeeded with position='random'"),
    ([A.PadIfNeeded(40, 40, p=0.5)], "PadIfNeeded with p=0.5"),
    ([A.RandomCrop(40, 40)], "RandomCrop to 40 x 40 from 32 x 32"),
    ([A.Normalize(MEAN, STD, p=0.5)], "Normalize with p=0.5"),
    ([A.Normalize(MEAN, STD, normalization="image")], "Normalize with normalization='image'"),
    ([A.Normalize(MEAN, STD), A.HorizontalFlip()], "Normalize")])
def test_what_it_cannot_run_is_named(transforms, words):
    with pytest.raises(Unsupported, match=f"^{re.escape(words)}$"):
        on_device(A.Compose(transforms))


def test_only_a_plain_compose_is_a_policy():
    for policy, words in ((A.OneOf([A.HorizontalFlip()], p=1), "OneOf"), (A.SomeOf([A.HorizontalFlip()], n=1), "SomeOf"),
                          (A.Compose([A.HorizontalFlip()], p=0.5), "Compose with p=0.5")):
        with pytest.raises(Unsupported, match=words):
            on_device(policy)


@pytest.mark.parametrize("fill", [300, -5, 7.5, (0, 300, 254.6)])
def test_a_fill_outside_the_range_of_a_pixel_is_taken_as_albumentations_takes_it(fill, images):
    for transform in (A.Affine(translate_px=(9, 9), fill=fill, p=1), A.PadIfNeeded(40, 40, fill=fill)):
        own = on_device(A.Compose([transform])).transforms[0]
        ours = unpack(own(pack(torch.from_numpy(images[:1])), own.sample(uniform(1, own.draws))))
        assert np.array_equal(ours[0].numpy(), transform(image=images[0])["image"])
