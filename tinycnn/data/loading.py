"""Load the dataset that a config names."""

import dataclasses
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from config import Config, UserError
from tinycnn.data.cifar10 import NoConnection, cifar10, find_cifar10
from tinycnn.data.dataset import Dataset
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


_ahead: dict[str, Future[Dataset]] = {}  # by data_dir


def load_ahead(config: Config) -> None:
    """Load the config's CIFAR-10 in a thread, if it is on this machine, while PyTorch is imported. load_dataset waits for it,
    and returns or raises what came of it."""
    root = Path(config.data_dir)
    if config.dataset in ("auto", "cifar10") and find_cifar10(root).exists():
        _ahead[config.data_dir] = ThreadPoolExecutor(1).submit(cifar10, root)


def load_dataset(dataset: str, data_dir: str) -> Dataset:
    """Load `dataset`, one of the values of Config.dataset, from `data_dir`.

    "auto" is CIFAR-10; where the user named no `data_dir` and there is no connection, the built-in set. Raises UserError where
    the dataset can't be used, DatasetMissing where it is not there and could not be downloaded.
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
        return _ahead.pop(data_dir).result() if data_dir in _ahead else cifar10(root)
    except NoConnection as error:
        if dataset == "cifar10" or named:
            raise
        print(error, file=sys.stderr)
        print(BANNER, flush=True)
        return synthetic()


def resolve_auto(config: Config, dataset: Dataset) -> Config:
    """Replace "auto" by what it came to: "cifar10", or a demonstration: "synthetic" for DEMONSTRATION_EPOCHS at most."""
    is_demonstration = config.dataset == "auto" and dataset.kind == "synthetic"
    epochs = min(config.epochs, DEMONSTRATION_EPOCHS) if is_demonstration else config.epochs
    return dataclasses.replace(config, dataset=dataset.kind, epochs=epochs, warmup=min(config.warmup, epochs - 1))
