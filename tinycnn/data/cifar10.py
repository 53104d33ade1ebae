"""The official CIFAR-10, checked by MD5 and downloaded when absent."""

import hashlib
import os
import pickle
import socket
import tempfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from config import SIDE, UserError
from tinycnn.data.dataset import DatasetMissing, Images, Split, empty_split
from tinycnn.data.folder import has_training_classes
from tinycnn.data.leftovers import remove_leftovers
from tinycnn.text import printable

BATCHES_FOLDER = "cifar-10-batches-py"
# The files of the official CIFAR-10 and their MD5, as torchvision.datasets.CIFAR10 has them
TRAIN_FILES = {"data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
               "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
               "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb"}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
NAMES_FILE = ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888")
MOST_BYTES = 2**26  # of a file that is read: the official ones have 31 MB
TIMEOUT = 15  # seconds without an answer; without it a silent network hangs for ever


def find_cifar10(root: Path) -> Path:
    """The folder cifar-10-batches-py, which may be missing: in `root`, or `root` itself where it has that name."""
    inner = root / BATCHES_FOLDER
    resolved = Path(os.path.realpath(root))
    return resolved if resolved.name == BATCHES_FOLDER and not inner.exists() else inner


def cifar10(root: Path) -> Images:
    """Load the 50,000 training and 10,000 test images; `root` is as in find_cifar10. Download them where they are absent."""
    folder = find_cifar10(root)
    remove_leftovers(folder.parent, ".download-*")
    if not folder.exists():
        _download(folder.parent)
    train, test = (_read_split(folder, files) for files in (TRAIN_FILES, TEST_FILES))
    return Images("cifar10", tuple(_read(folder, *NAMES_FILE)["label_names"]), train, test, empty_split())


def _read_split(folder: Path, files: dict[str, str]) -> Split:
    parts = [_read(folder, name, md5) for name, md5 in files.items()]
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([part["labels"] for part in parts])
    return Split(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels.astype(np.int64))


def _read(folder: Path, name: str, md5: str) -> dict[str, Any]:
    """The content of an official file. Unpickling runs what a file says, so only those are unpickled."""
    path = folder / name
    content = b""
    if path.is_file():
        with path.open("rb") as file:
            content = file.read(MOST_BYTES)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        state = "damaged" if path.exists() else "missing"
        raise UserError(printable(f"{path} is {state}: put the official file there, or delete {folder} to have CIFAR-10 "
                                  "downloaded again"))
    return pickle.loads(content, encoding="latin1")


def _download(root: Path) -> None:
    """Download into a temporary folder, then rename, so that a broken download leaves nothing that looks like CIFAR-10."""
    # Only this needs torchvision. It imports torch._dynamo for seconds, and a build that doesn't match torch can't be imported
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(printable(f"CIFAR-10 is downloaded with torchvision, which can't be imported ({error}): install the "
                                  "release that fits torch, or train on --dataset folder or synthetic")) from error
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            CIFAR10(temporary, download=True)
            os.rename(Path(temporary) / BATCHES_FOLDER, root / BATCHES_FOLDER)
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError; a wrong MD5, a RuntimeError
        if (root / BATCHES_FOLDER).exists():
            return  # another run was quicker
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        ways = ("add --dataset folder to train on the images in its train/<class>" if has_training_classes(root) else
                f"put {BATCHES_FOLDER} there, name its folder with --data-dir, or train on --dataset folder or "
                "--dataset synthetic")
        raise DatasetMissing(printable(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): {ways}")) from error
    finally:
        socket.setdefaulttimeout(timeout)
