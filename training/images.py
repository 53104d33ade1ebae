"""The pictures: CIFAR-10, a folder of the user's own, or the built-in set. All three come out as the same `Images`."""

import dataclasses
import hashlib
import math
import os
import secrets
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import PIL

from config import UserError
from training.decoding import decode_all
from training.shapes import KINDS, SIDE, draw

SUFFIXES = {".png", ".jpg", ".jpeg"}
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Split:
    """`images`: uint8, N x 32 x 32 x 3, RGB. `labels`: int64, N."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """A dataset in memory. `kind` is cifar10, folder or synthetic; `validation` is empty unless held out of `train`."""

    kind: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    validation: Split

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels of `train`, as fractions of 255 (the deviation at
        least 1/255). From whole-number sums, so the same to the bit on every machine."""
        means, deviations = [], []
        for channel in range(3):
            parts = np.array_split(self.train.images[..., channel], len(self.train) // 5000 + 1)
            counts = np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], axis=0).tolist()
            pixels, total = sum(counts), sum(value * count for value, count in enumerate(counts))
            squares = sum(value * value * count for value, count in enumerate(counts))
            means.append(total / (255 * pixels))
            deviations.append(max(math.sqrt(squares * pixels - total * total) / (255 * pixels), 1 / 255))
        return tuple(means), tuple(deviations)

    def fingerprint(self) -> str:
        """SHA-256 over all pictures, labels and class names: the same data, whatever folder it lies in."""
        digest = hashlib.sha256(os.fsencode("\0".join(self.class_names)))
        for split in (self.train, self.validation, self.test):
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()

    def hold_out(self, count: int) -> "Images":
        """Move `count` training images to `validation`, the same ones every time, equally many of each class (the
        first classes give one more where `count` is no multiple). Raises UserError where a class has too few."""
        if not count:
            return self
        classes = len(self.class_names)
        order = np.random.Generator(np.random.Philox(key=2718)).permutation(len(self.train))
        held: list[np.ndarray] = []
        for label, name in enumerate(self.class_names):
            share = count // classes + (label < count % classes)
            members = order[self.train.labels[order] == label]
            if len(members) <= share:
                raise UserError(f"validation is {count}, which takes {share} images of each class, "
                                f"but class {name} has only {len(members)} training images; lower validation")
            held.append(members[:share])
        out = np.zeros(len(self.train), dtype=bool)
        out[np.concatenate(held)] = True
        return dataclasses.replace(self, train=_select(self.train, ~out), validation=_select(self.train, out))


def _select(split: Split, chosen: np.ndarray) -> Split:
    return Split(split.images[chosen], split.labels[chosen])


def load(dataset: str, data_dir: str) -> Images:
    """The pictures of `dataset`, one of the values of Config.dataset, in or below `data_dir`.

    Raises UserError for anything missing, damaged or unreadable, naming it.
    """
    if dataset == "synthetic":
        return synthetic()
    if dataset == "folder":
        return folder(Path(data_dir))
    try:
        return cifar10(Path(data_dir))
    except NotThere as error:
        if dataset == "cifar10":
            raise
        print(error, file=sys.stderr)
        return synthetic()


# ---------------------------------------------------------------- CIFAR-10

class NotThere(UserError):
    """CIFAR-10 is not on this machine and could not be downloaded."""


def cifar10(root: Path) -> Images:
    """The official CIFAR-10 in `root`/cifar-10-batches-py, downloaded when absent: 50,000 training, 10,000 test images.

    Raises NotThere when it is absent and can't be downloaded; UserError naming the file whose MD5 is wrong.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    batches = root / CIFAR10.base_folder
    if not batches.exists():
        _download(CIFAR10, root)
    listed = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    for name, md5 in listed:
        if not check_integrity(str(batches / name), md5):
            state = "damaged" if (batches / name).exists() else "missing"
            raise UserError(f"{batches / name} is {state}: put the official file there, "
                            f"or delete {batches} to have CIFAR-10 downloaded again")
    parts = [CIFAR10(str(root), train=is_train) for is_train in (True, False)]
    train, test = (Split(np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64)) for part in parts)
    return Images("cifar10", tuple(parts[0].classes), train, test, _nothing())


def _download(dataset: type, root: Path) -> None:
    """Download into a folder beside, then rename, so that a broken download leaves nothing that looks like CIFAR-10."""
    made = not root.exists()
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # seconds without an answer; without it a silent network hangs for ever
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as beside:
            dataset(beside, download=True)
            os.rename(Path(beside) / dataset.base_folder, root / dataset.base_folder)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError; a wrong MD5, a RuntimeError
        if (root / dataset.base_folder).exists():  # type: ignore[attr-defined]
            return  # another run was quicker
        if made:
            with suppress(OSError):
                root.rmdir()
        raise NotThere(
            f"CIFAR-10 is not in {root} and could not be downloaded ({error}): put cifar-10-batches-py there, name its "
            "folder with --data-dir, or train on --dataset folder or --dataset synthetic") from error
    finally:
        socket.setdefaulttimeout(patience)


def _nothing() -> Split:
    return Split(np.zeros((0, SIDE, SIDE, 3), dtype=np.uint8), np.zeros(0, dtype=np.int64))


# ---------------------------------------------------------------- a folder of images

def folder(root: Path) -> Images:
    """`root`/train/<class>/* and `root`/test/<class>/*, PNG or JPEG, resized to 32x32 where they have another size.

    Decoded once, into `root`/.cache.npz, which is made anew when a file is added, removed or changed. Raises UserError
    naming what is missing or the file that can't be read.
    """
    files, class_names, state = _list_files(root)
    cache = root / ".cache.npz"
    splits = _read_cache(cache, state)
    if splits is None:
        images = decode_all([path for split in SPLITS for path, _ in files[split]])
        labels = np.array([label for split in SPLITS for _, label in files[split]], dtype=np.int64)
        border = len(files["train"])
        splits = Split(images[:border], labels[:border]), Split(images[border:], labels[border:])
        _write_cache(cache, state, splits)
    return Images("folder", class_names, *splits, _nothing())


def _list_files(root: Path) -> tuple[dict[str, list[tuple[str, int]]], tuple[str, ...], str]:
    """The image files of each split with their labels, the class names, and a hash of names, sizes and times."""
    classes = {split: _class_folders(root / split) for split in SPLITS}
    lone = sorted(set(classes["train"]) ^ set(classes["test"]))
    if lone:
        there = "train" if lone[0] in classes["train"] else "test"
        raise UserError(f"class {lone[0]} is in {root / there} only: every class needs a folder in both train and test")
    if len(classes["train"]) < 2:
        raise UserError(f"{root / 'train'} holds {len(classes['train'])} class folders, but training needs at least two")
    digest = hashlib.sha256(f"{SIDE} {PIL.__version__} white".encode())  # another decoder, another cache
    files: dict[str, list[tuple[str, int]]] = {}
    for split in SPLITS:
        files[split] = []
        for label, name in enumerate(classes["train"]):
            inside = sorted((e for e in os.scandir(root / split / name) if not e.name.startswith(".")), key=lambda e: e.name)
            images = [e for e in inside if Path(e.name).suffix.lower() in SUFFIXES]
            if not images:
                raise UserError(f"{root / split / name} holds no PNG or JPEG files")
            if len(images) < len(inside):
                print(f"{root / split / name}: {len(inside) - len(images)} files that are not PNG or JPEG are left out",
                      file=sys.stderr)
            for entry in images:
                stat = entry.stat()
                digest.update(os.fsencode(f"{split}/{name}/{entry.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
                files[split].append((entry.path, label))
    return files, tuple(classes["train"]), digest.hexdigest()


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --dataset folder needs DIR/train/<class>/* and DIR/test/<class>/* "
                        "in the DIR that --data-dir names")
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _read_cache(cache: Path, state: str) -> tuple[Split, Split] | None:
    """The splits, or None where there is no cache of just this state of the folder."""
    with suppress(Exception), np.load(cache) as stored:  # numpy raises nearly anything on a damaged file
        if str(stored["state"]) == state:
            train, test = (Split(stored[f"{split}_images"], stored[f"{split}_labels"]) for split in SPLITS)
            return train, test
    return None


def _write_cache(cache: Path, state: str, splits: tuple[Split, Split]) -> None:
    beside = cache.with_name(f".cache-{secrets.token_hex(4)}.npz")
    arrays = {f"{name}_{what}": getattr(split, what)
              for name, split in zip(SPLITS, splits, strict=True) for what in ("images", "labels")}
    try:
        np.savez(beside, state=np.array(state), **arrays)
        os.replace(beside, cache)
    except OSError as error:
        print(f"the decoded images could not be kept in {cache} ({error.strerror}): "
              "they will be decoded again next time", file=sys.stderr)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


# ---------------------------------------------------------------- the built-in set

def synthetic() -> Images:
    """The drawn shapes: 5,000 training, 1,000 test images, the same ones every time."""
    return Images("synthetic", KINDS, Split(*draw(5000, key=1)), Split(*draw(1000, key=2)), _nothing())
