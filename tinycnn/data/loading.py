"""Load the images that a config names."""

import dataclasses
import sys
from pathlib import Path

from config import Config, UserError
from tinycnn.data.cifar10 import cifar10, find_cifar10
from tinycnn.data.dataset import DatasetMissing, Images
from tinycnn.data.folder import has_training_classes, image_folder
from tinycnn.data.synthetic import synthetic
from tinycnn.text import printable

DEMONSTRATION_EPOCHS = 5
BANNER = """
********************************************************************************
*  DEMONSTRATION on built-in drawn shapes, because there is no CIFAR-10 here.  *
*  No figure of this run says anything about CIFAR-10.                         *
********************************************************************************
"""


def load_images(dataset: str, data_dir: str) -> Images:
    """Load the images of `dataset`, one of the values of Config.dataset, from `data_dir`.

    "auto" is CIFAR-10; without it, the built-in images, unless the user named a `data_dir`.
    """
    root = Path(data_dir)
    if dataset == "synthetic":
        return synthetic()
    if dataset == "folder":
        return image_folder(root)
    named = data_dir != Config.data_dir
    if dataset == "auto" and named and has_training_classes(root) and not find_cifar10(root).exists():
        raise UserError(printable(f"{data_dir} holds train/<class>, not CIFAR-10: add --dataset folder to train on its images"))
    try:
        return cifar10(root)
    except DatasetMissing as error:
        if dataset == "cifar10" or named:
            raise
        print(error, file=sys.stderr)
        print(BANNER, flush=True)
        return synthetic()


def resolve_dataset(config: Config, images: Images) -> Config:
    """Replace "auto" by the dataset that was loaded. Cut a run that was meant for CIFAR-10 but got the built-in images to
    DEMONSTRATION_EPOCHS."""
    is_demonstration = config.dataset == "auto" and images.kind == "synthetic"
    epochs = min(config.epochs, DEMONSTRATION_EPOCHS) if is_demonstration else config.epochs
    return dataclasses.replace(config, dataset=images.kind, epochs=epochs)
