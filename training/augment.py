"""The Albumentations policies for training and test images, made from the config."""

import albumentations as A
import cv2

from config import Config
from training.shapes import SIDE


def train_policy(config: Config, mean: tuple[float, ...], deviation: tuple[float, ...]) -> A.Compose:
    """What happens to a training image: uint8 32 x 32 x 3 in, float32 32 x 32 x 3 out. `mean` and `deviation` are
    each channel's, as fractions of 255. A step whose probability, or size, is 0 is left out.

    `Affine` is what Albumentations 2 recommends in place of the deprecated ShiftScaleRotate, here with its ranges and
    its border. It shifts by whole pixels, rounded towards zero: 3/32 of the side is two pixels at the most, which older
    releases reached, in fractions of pixels, with 2/32.
    """
    size = (config.coarse_dropout_size, config.coarse_dropout_size)
    padded = SIDE + 2 * config.crop_padding
    crop = [A.PadIfNeeded(padded, padded, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(SIDE, SIDE)]
    steps = [
        A.HorizontalFlip(p=config.flip_p),
        A.Affine(translate_percent=(-config.shift, config.shift), scale=(1 - config.scale, 1 + config.scale),
                 keep_ratio=True, rotate=(-config.rotate, config.rotate), border_mode=cv2.BORDER_REFLECT_101,
                 p=config.affine_p),
        *(crop if config.crop_padding else []),
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=size, hole_width_range=size,
                        fill=tuple(round(255 * channel) for channel in mean), p=config.coarse_dropout_p),
        A.Normalize(mean, deviation),
    ]
    return A.Compose([step for step in steps if step.p > 0])


def test_policy(mean: tuple[float, ...], deviation: tuple[float, ...]) -> A.Compose:
    """What happens to an image that is only looked at: normalization. Shapes and types as in train_policy."""
    return A.Compose([A.Normalize(mean, deviation)])
