"""The Albumentations policies of training and test images."""

from dataclasses import replace

import albumentations as A
import cv2

from config import SIDE, Config


def train_policy(config: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """Augmentation and normalization: uint8 32 x 32 x 3 to float32 S x S x 3, with S the config's `crop_size`. Transforms whose
    probability or size is 0 are left out.

    `mean` and `std` are each channel's, as fractions of 255. `Affine` stands in for the deprecated ShiftScaleRotate, with its
    ranges and its border. It shifts by whole pixels, rounded towards zero: 3/32 of the side is at most two pixels, which older
    releases reached, in fractions of pixels, with 2/32.
    """
    side, padded = config.crop_size, SIDE + 2 * config.crop_padding
    size = (min(config.coarse_dropout_size, side),) * 2
    pad = [A.PadIfNeeded(padded, padded, border_mode=cv2.BORDER_REFLECT_101)] if config.crop_padding else []
    crop = [A.RandomCrop(side, side)] if side < padded else []
    transforms = [
        A.HorizontalFlip(p=config.flip_p),
        A.Affine(translate_percent=(-config.shift, config.shift), scale=(1 - config.scale, 1 + config.scale),
                 keep_ratio=True, rotate=(-config.rotate, config.rotate), border_mode=cv2.BORDER_REFLECT_101,
                 p=config.affine_p),
        *pad, *crop,
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=size, hole_width_range=size,
                        fill=tuple(round(255 * channel) for channel in mean), p=config.coarse_dropout_p),
        A.Normalize(mean, std),
    ]
    return A.Compose([transform for transform in transforms if transform.p > 0])


def uncropped_policy(config: Config, mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """As train_policy, without a crop: the images of the last epochs, as large as those of a test."""
    return train_policy(replace(config, crop_padding=0, crop_size=SIDE), mean, std)


def test_policy(mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """Normalization alone. Shapes and types as in train_policy."""
    return A.Compose([A.Normalize(mean, std)])
