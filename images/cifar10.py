"""The official CIFAR-10, checked by MD5 and downloaded when absent."""

import os
import socket
import tempfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import numpy as np

from config import UserError
from images.dataset import Images, Split, empty_split
from images.folder import has_training_classes
from images.leftovers import remove_leftovers
from images.names import printable

BATCHES_FOLDER = "cifar-10-batches-py"
TIMEOUT = 15  # seconds without an answer; without it a silent network hangs for ever


class DatasetMissing(UserError):
    """CIFAR-10 is not on this machine and could not be downloaded."""


def find_cifar10(root: Path) -> Path:
    """The folder cifar-10-batches-py, which may be missing: in `root`, or `root` itself where it has that name."""
    inner = root / BATCHES_FOLDER
    resolved = Path(os.path.realpath(root))
    return resolved if resolved.name == BATCHES_FOLDER and not inner.exists() else inner


def cifar10(root: Path) -> Images:
    """Load the 50,000 training and 10,000 test images; `root` is as in find_cifar10. Download them where they are absent."""
    torchvision = _torchvision_datasets()
    folder = find_cifar10(root)
    root = folder.parent
    remove_leftovers(root, ".download-*")
    dataset = torchvision.CIFAR10
    if not folder.exists():
        _download(dataset, root)
    for name, md5 in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]:
        if not torchvision.utils.check_integrity(str(folder / name), md5):
            state = "damaged" if (folder / name).exists() else "missing"
            raise UserError(printable(f"{folder / name} is {state}: put the official file there, "
                                      f"or delete {folder} to have CIFAR-10 downloaded again"))
    parts = [dataset(str(root), train=is_train) for is_train in (True, False)]
    train, test = (Split(np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64)) for part in parts)
    return Images("cifar10", tuple(parts[0].classes), train, test, empty_split())


def _torchvision_datasets() -> ModuleType:
    # Only CIFAR-10 needs torchvision, and a build that doesn't match torch can't even be imported.
    try:
        import torchvision.datasets
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(printable(f"CIFAR-10 is read with torchvision, which can't be imported ({error}): install the "
                                  "release that fits torch, or train on --dataset folder or synthetic")) from error
    return torchvision.datasets


def _download(dataset: type, root: Path) -> None:
    """Download into a temporary folder, then rename, so that a broken download leaves nothing that looks like CIFAR-10."""
    made = not root.exists()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            dataset(temporary, download=True)
            os.rename(Path(temporary) / BATCHES_FOLDER, root / BATCHES_FOLDER)
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError; a wrong MD5, a RuntimeError
        if (root / BATCHES_FOLDER).exists():
            return  # another run was quicker
        if made:
            with suppress(OSError):
                root.rmdir()
        ways = ("add --dataset folder to train on the images in its train/<class>" if has_training_classes(root) else
                f"put {BATCHES_FOLDER} there, name its folder with --data-dir, or train on --dataset folder or "
                "--dataset synthetic")
        raise DatasetMissing(printable(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): {ways}")) from error
    finally:
        socket.setdefaulttimeout(timeout)
