"""The official CIFAR-10, checked by MD5 and downloaded when absent."""

import errno
import hashlib
import os
import pickle
import shutil
import socket
import tempfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import cv2
import numpy as np
from tqdm import tqdm

from config import SIDE, UserError
from tinycnn.data.dataset import Dataset, DatasetMissing, Split, empty_split
from tinycnn.data.folder import has_training_classes
from tinycnn.data.leftovers import remove_leftovers
from tinycnn.text import printable

BATCHES_FOLDER = "cifar-10-batches-py"
# The official CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html, and the MD5 of its files
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
TRAIN_FILES = {"data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
               "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
               "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb"}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
NAMES_FILE = ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888")
MOST_BYTES = 2**26  # of a file that is read: the official ones have 31 MB
TIMEOUT = 15  # seconds without an answer; without it a silent network hangs for ever
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}


class NoConnection(DatasetMissing):
    """CIFAR-10 is not on this machine, and the machine has no connection."""


def find_cifar10(root: Path) -> Path:
    """The folder cifar-10-batches-py, which may be missing: in `root`, or `root` itself where it has that name."""
    inner = root / BATCHES_FOLDER
    resolved = Path(os.path.realpath(root))
    return resolved if resolved.name == BATCHES_FOLDER and not inner.exists() else inner


def cifar10(root: Path) -> Dataset:
    """Load the 50,000 training and 10,000 test images; `root` is as in find_cifar10. Download them where they are absent.

    Raises UserError where a file is damaged, DatasetMissing where the download fails, NoConnection where there is none.
    """
    folder = find_cifar10(root)
    remove_leftovers(folder.parent, ".download-*")
    if folder.is_symlink() and not folder.exists():
        raise UserError(printable(f"{folder} is a link to what is not there: repair or remove it"))
    if not folder.exists():
        _download(folder.parent)
    train, test = (_read_split(folder, files) for files in (TRAIN_FILES, TEST_FILES))
    return Dataset("cifar10", tuple(_read(folder, *NAMES_FILE)["label_names"]), train, test, empty_split())


def _read_split(folder: Path, files: dict[str, str]) -> Split:
    parts = [_read(folder, name, md5) for name, md5 in files.items()]
    planes = np.split(np.concatenate([part["data"] for part in parts]), 3, axis=1)  # of each channel: uint8, N x 1,024
    labels = np.concatenate([part["labels"] for part in parts])
    return Split(cv2.merge(planes).reshape(-1, SIDE, SIDE, 3), labels.astype(np.int64))  # five times as fast as transpose()


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
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            _fetch(Path(temporary))
            os.rename(Path(temporary) / BATCHES_FOLDER, root / BATCHES_FOLDER)
    except (OSError, HTTPException) as error:
        if (root / BATCHES_FOLDER).exists():
            return  # another run was quicker
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        ways = ("add --dataset folder to train on the images in its train/<class>" if has_training_classes(root) else
                f"try again, put {BATCHES_FOLDER} there, name its folder with --data-dir, or train on --dataset folder or "
                "--dataset synthetic")
        missing = NoConnection if _is_unconnected(error) else DatasetMissing
        raise missing(printable(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): {ways}")) from error


def _fetch(folder: Path) -> None:
    """Download the archive into `folder`, check it and unpack it there."""
    archive = folder / "cifar-10-python.tar.gz"
    with urlopen(URL, timeout=TIMEOUT) as response, archive.open("wb") as file, tqdm.wrapattr(
            response, "read", total=response.length, desc="downloading", disable=None, leave=False) as source:
        shutil.copyfileobj(source, file)
    with archive.open("rb") as file:
        if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != ARCHIVE_MD5:
            raise OSError(f"what came from {URL} is not the official archive")
    shutil.unpack_archive(archive, folder)


def _is_unconnected(error: Exception) -> bool:
    """Whether no server was reached. A server's error, a connection that was lost and a full disk are other things."""
    reason = error.reason if isinstance(error, URLError) else None
    return isinstance(reason, (socket.gaierror, ConnectionRefusedError, TimeoutError)) or (
        isinstance(reason, OSError) and reason.errno in UNREACHABLE)
