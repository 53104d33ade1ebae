"""The Albumentations policies of training and test images: edit them to change the augmentation.

Transforms that docs/augmentation.md names run on whole batches; with any other, worker processes augment
image by image, and the program says so.
"""

import albumentations as A
import cv2

from config import SIDE, Config


def train_policy(config: Config, epoch: int, mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """The augmentation and normalization of an epoch: uint8 32 x 32 x 3 to float32 S x S x 3, with S the config's `crop_size`,
    or 32 in the last epochs, which have whole images. `mean` and `std` are each channel's, as fractions of 255. Transforms
    whose probability or size is 0 are left out.

    `Affine` stands in for the deprecated ShiftScaleRotate, with its ranges and its border. It shifts by whole pixels, rounded
    towards zero, so 3/32 of the side reaches two pixels. Older releases shifted by fractions of a pixel.
    """
    crops = epoch < config.epochs - round(config.whole_images_share * config.epochs)
    side, padding = (config.crop_size, config.crop_padding) if crops else (SIDE, 0)
    padded, hole = SIDE + 2 * padding, min(config.coarse_dropout_size, side)
    pad = [A.PadIfNeeded(padded, padded, border_mode=cv2.BORDER_REFLECT_101)] if padding else []
    crop = [A.RandomCrop(side, side)] if side < padded else []
    transforms = [
        A.HorizontalFlip(p=config.flip_p),
        A.Affine(translate_percent=(-config.shift, config.shift), scale=(1 - config.scale, 1 + config.scale),
                 keep_ratio=True, rotate=(-config.rotate, config.rotate), border_mode=cv2.BORDER_REFLECT_101,
                 p=config.affine_p),
        *pad, *crop,
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(hole, hole), hole_width_range=(hole, hole),
                        fill=tuple(round(255 * channel) for channel in mean), p=config.coarse_dropout_p),
        A.Normalize(mean, std),
    ]
    return A.Compose([transform for transform in transforms if transform.p > 0])


def test_policy(mean: tuple[float, ...], std: tuple[float, ...]) -> A.Compose:
    """Normalization alone, which is all that `predict` and `export` do to an image too. Shapes and types as in train_policy."""
    return A.Compose([A.Normalize(mean, std)])
